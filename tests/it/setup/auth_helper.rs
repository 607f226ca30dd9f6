//! `setup --auth-helper`.

use super::*;

const SCRIPT: &str = "etc/containers/nydus-store-auth-helper";
const KEY: &str = "additional-layer-store-auth-helper = \"/etc/containers/nydus-store-auth-helper\"";

#[test]
fn it_comes_stays_and_goes() {
    let tree = Tree::debian();
    tree.setup(&["--registry", "docker.io"]);
    let without = tree.snapshot();
    assert!(!tree.read(OURS).contains("auth-helper ="));

    tree.setup(&["--auth-helper", "--root", "/srv/the root"]);
    let script = tree.read(SCRIPT);
    assert!(
        script.starts_with("#!/bin/sh\n")
            && script.ends_with("exec '/usr/local/bin/nydus-store' auth-helper --root '/srv/the root'\n"),
        "{script}"
    );
    assert_eq!(tree.at(SCRIPT).metadata().unwrap().mode() & 0o7777, 0o755);
    // Before all tables.
    let ours = tree.read(OURS);
    assert!(ours.find(KEY).unwrap() < ours.find("[[registry]]").unwrap(), "{ours}");
    assert_eq!(tree.prefixes(), ["docker.io"]);

    let once = tree.snapshot();
    tree.setup(&["--root", "/srv/the root"]);
    tree.setup(&["--root", "/srv/the root", "--auth-helper"]);
    assert_eq!(tree.snapshot(), once);
    // It does not need a registry with the mirror.
    tree.setup(&["--remove", "--registry", "docker.io", "--root", "/srv/the root"]);
    assert!(tree.read(OURS).contains(KEY) && !tree.read(OURS).contains("[[registry]]"));

    tree.setup(&["--remove", "--root", "/srv/the root"]);
    assert!(!tree.at(SCRIPT).exists() && !tree.at(OURS).exists());
    assert!(without.contains_key(&tree.at(OURS)));
}

#[test]
fn the_program_is_where_it_is_in_the_tree() {
    let tree = Tree::new(&[("usr/bin/nydus-store", "")]);
    tree.setup(&["--auth-helper"]);
    assert!(tree.read(SCRIPT).contains("exec '/usr/bin/nydus-store' "));
}

#[test]
fn another_helper_is_told_of() {
    let theirs = "additional-layer-store-auth-helper = \"/usr/bin/other\"\n";
    for (path, told) in [
        (REGISTRIES, "which gets none any more"),
        ("etc/containers/registries.conf.d/10.conf", "which gets none any more"),
        (
            "etc/containers/registries.conf.d/zzz.conf",
            "so that nydus-store gets none",
        ),
    ] {
        let tree = Tree::new(&[(path, theirs)]);
        assert!(!tree.setup(&[]).1.contains("/usr/bin/other"));
        let (_, notes) = tree.setup(&["--auth-helper"]);
        assert!(notes.contains(told) && notes.contains("/usr/bin/other"), "{notes}");
        assert_eq!(tree.read(path), theirs);
    }
}

#[test]
fn somebody_else_s_script_stays() {
    let tree = Tree::new(&[(SCRIPT, "#!/bin/sh\nexec true\n")]);
    for args in [&["--auth-helper"][..], &["--remove"]] {
        let message = tree.fails(args);
        assert!(message.contains(SCRIPT), "{message}");
    }
}
