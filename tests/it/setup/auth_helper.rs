//! The auth helper script written by `setup`.

use super::*;

#[test]
fn auth_helper_script_is_written_and_removed() {
    let tree = Tree::debian();
    tree.setup(&["--root", "/srv/the root"]);
    let script = tree.read(SCRIPT);
    assert!(
        script.starts_with("#!/bin/sh\n")
            && script.ends_with("exec '/usr/local/bin/nydus-store' auth-helper --root '/srv/the root'\n"),
        "{script}"
    );
    assert_eq!(tree.at(SCRIPT).metadata().unwrap().mode() & 0o7777, 0o755);
    assert!(
        tree.read(OURS)
            .contains("additional-layer-store-auth-helper = \"/etc/containers/nydus-store-auth-helper\"")
    );
    tree.setup(&["--remove", "--root", "/srv/the root"]);
    assert!(!tree.at(SCRIPT).exists() && !tree.at(OURS).exists());
}

#[test]
fn auth_helper_script_runs_the_program_of_the_tree() {
    let tree = Tree::new(&[("usr/bin/nydus-store", "")]);
    tree.setup(&[]);
    assert!(tree.read(SCRIPT).contains("exec '/usr/bin/nydus-store' "));
}

#[test]
fn another_auth_helper_is_reported() {
    let theirs = "additional-layer-store-auth-helper = \"/usr/bin/other\"\n";
    for (path, told) in [
        (REGISTRIES, "which no longer runs"),
        ("etc/containers/registries.conf.d/10.conf", "which no longer runs"),
        (
            "etc/containers/registries.conf.d/zzz.conf",
            "so pulls are not announced",
        ),
    ] {
        let tree = Tree::new(&[(path, theirs)]);
        let (_, notes) = tree.setup(&[]);
        assert!(notes.contains(told) && notes.contains("/usr/bin/other"), "{notes}");
        assert_eq!(tree.read(path), theirs);
    }
}

#[test]
fn foreign_script_is_kept() {
    let tree = Tree::new(&[(SCRIPT, "#!/bin/sh\nexec true\n")]);
    for args in [&[][..], &["--remove"]] {
        let message = tree.fails(args);
        assert!(message.contains(SCRIPT), "{message}");
    }
}
