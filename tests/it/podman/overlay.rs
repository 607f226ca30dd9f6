//! The overlay on a lazy image: what containers see and change.

use std::{
    fs::{self, File},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink},
    path::{Path, PathBuf},
};

use nydus_store::fixtures::{BuildOptions, CompareOptions, TreeSpec, compare_trees, make_tree};

use super::{NUMBERS, PodmanLab, Release, on_each_release, runnable_tree, source_dir};
use crate::common::RunPodman as _;

on_each_release!(
    mounted_image_equals_its_source,
    changed_file_shows_its_new_content,
    partial_write_keeps_the_rest_of_a_big_file,
    deleted_file_is_gone_and_can_be_recreated,
    renamed_files_and_directories_keep_their_contents,
    recreated_directory_is_empty,
    file_and_directory_can_replace_each_other,
    hard_link_shows_changes_of_its_file,
    changed_modes_and_owners_are_shown,
    copy_up_keeps_times_and_modes,
    copy_up_keeps_capabilities_and_xattrs,
    unchanged_files_keep_capabilities_modes_and_links,
    file_modes_apply_to_other_users,
    read_only_container_rejects_writes,
    podman_cp_copies_in_both_directions,
    podman_diff_lists_changes,
    published_layer_rejects_writes,
);

/// A file capability, `cap_net_raw+ep`, as the kernel stores it (version 2).
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// Makes a system with metadata that a copy-up may lose.
fn system(dir: &Path) {
    runnable_tree(dir);
    let data = dir.join("data");
    fs::create_dir_all(data.join("dir/sub")).unwrap();
    fs::write(data.join("dir/a"), "a\n").unwrap();
    fs::write(data.join("dir/sub/b"), "b\n").unwrap();
    for (name, mode) in [
        ("secret", 0o600),
        ("setuid", 0o4755),
        ("capable", 0o755),
        ("attributes", 0o644),
    ] {
        fs::write(data.join(name), name).unwrap();
        fs::set_permissions(data.join(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    xattr::set(data.join("capable"), "security.capability", &CAPABILITY).unwrap();
    xattr::set(data.join("attributes"), "user.comment", b"kept").unwrap();
    symlink("hello", data.join("link")).unwrap();
    fs::hard_link(data.join("dir/a"), data.join("dir/hard")).unwrap();
}

/// Runs a script in a container of [`system`].
async fn sh(release: Release, script: &str) -> String {
    let (lab, image) = start_system(release).await;
    lab.sh(&image, script)
}

async fn start_system(release: Release) -> (PodmanLab, String) {
    let lab = PodmanLab::start(release);
    let built = lab.build(&[lab.layer(system)], &BuildOptions::default());
    let image = lab.push(&built, "system", "1").await;
    (lab, image)
}

/// Runs a script in a container named `changed`; returns the container's root as a path of the host.
async fn run_changed(release: Release, script: &str) -> (PodmanLab, PathBuf) {
    let (lab, image) = start_system(release).await;
    lab.run_named("changed", &image, script);
    let mounted = lab.podman.run(&["mount", "changed"]);
    let root = lab.podman.outside(&mounted);
    (lab, root)
}

async fn mounted_image_equals_its_source(release: Release) {
    let lab = PodmanLab::start(release);
    let spec = TreeSpec::default();
    let tree = lab.layer(|dir| assert_eq!(make_tree(dir, &spec).unwrap(), [""; 0]));
    let image = lab
        .push(
            &lab.build(std::slice::from_ref(&tree), &BuildOptions::default()),
            "tree",
            "1",
        )
        .await;
    // Podman mounts no image whose layers are in a read-only store.
    lab.podman.run(&["create", "--name", "made", &image, "true"]);
    let mounted = lab.podman.run(&["mount", "made"]);
    let options = CompareOptions::default();
    let differences = compare_trees(source_dir(&tree), &lab.podman.outside(&mounted), &options).unwrap();
    assert!(differences.is_empty(), "{differences:#?}");
    lab.podman.run(&["unmount", "made"]);
}

async fn changed_file_shows_its_new_content(release: Release) {
    let got = sh(
        release,
        "echo more >> /data/hello; cat /data/hello; echo over > /data/hello; cat /data/link",
    )
    .await;
    assert_eq!(got, "hello\nmore\nover");
}

async fn partial_write_keeps_the_rest_of_a_big_file(release: Release) {
    let (lab, image) = start_system(release).await;
    let patched = format!("printf X | dd of={NUMBERS} bs=1 seek=2000000 conv=notrunc 2>/dev/null");
    let hash = format!("tail -c +2000002 {NUMBERS} | sha256sum; head -c 2000000 {NUMBERS} | sha256sum");
    assert_eq!(lab.sh(&image, &format!("{patched}; {hash}")), lab.sh(&image, &hash));
}

async fn deleted_file_is_gone_and_can_be_recreated(release: Release) {
    let got = sh(
        release,
        "rm /data/hello; ls /data | grep -c hello || true; echo new > /data/hello; cat /data/hello",
    )
    .await;
    assert_eq!(got, "0\nnew");
}

async fn renamed_files_and_directories_keep_their_contents(release: Release) {
    let got = sh(
        release,
        "mv /data/hello /data/hi; mv /data/dir /data/moved; \
        cat /data/hi /data/moved/a /data/moved/sub/b; ls /data/dir 2>/dev/null || echo gone",
    )
    .await;
    assert_eq!(got, "hello\na\nb\ngone");
}

async fn recreated_directory_is_empty(release: Release) {
    let got = sh(
        release,
        "rm -r /data/dir; mkdir /data/dir; ls -A /data/dir; echo x > /data/dir/a; cat /data/dir/a",
    )
    .await;
    assert_eq!(got, "x");
}

async fn file_and_directory_can_replace_each_other(release: Release) {
    let got = sh(
        release,
        "rm -r /data/dir /data/hello; echo file > /data/dir; mkdir /data/hello; \
        cat /data/dir; ls -A /data/hello; test -d /data/hello && echo dir",
    )
    .await;
    assert_eq!(got, "file\ndir");
}

async fn hard_link_shows_changes_of_its_file(release: Release) {
    let got = sh(
        release,
        "ln /data/hello /data/again; echo changed > /data/again; cat /data/hello; stat -c %h /data/hello",
    )
    .await;
    assert_eq!(got, "changed\n2");
}

async fn changed_modes_and_owners_are_shown(release: Release) {
    let got = sh(
        release,
        "chmod 640 /data/hello; chown 5:6 /data/hello; stat -c '%a %u:%g' /data/hello; cat /data/hello; \
        chmod 711 /data/dir; stat -c %a /data/dir; ls /data/dir | wc -l",
    )
    .await;
    assert_eq!(got, "640 5:6\nhello\n711\n3");
}

async fn copy_up_keeps_times_and_modes(release: Release) {
    let got = sh(
        release,
        "stat -c '%Y %a' /data/secret > /tmp/before; chown 1:1 /data/secret; chown 0:0 /data/secret; \
        stat -c '%Y %a' /data/secret | cmp - /tmp/before && echo same",
    )
    .await;
    assert_eq!(got, "same");
}

async fn copy_up_keeps_capabilities_and_xattrs(release: Release) {
    // A change of times copies a file up and, unlike a write, keeps capabilities and setuid.
    let (_lab, root) = run_changed(release, "touch -d @1 /data/capable /data/attributes /data/setuid").await;
    let data = root.join("data");
    assert_eq!(data.join("capable").metadata().unwrap().mtime(), 1);
    let attribute = |file: &str, name: &str| xattr::get(data.join(file), name).unwrap();
    assert_eq!(attribute("capable", "security.capability").unwrap(), CAPABILITY);
    assert_eq!(attribute("attributes", "user.comment").unwrap(), b"kept");
    assert_eq!(data.join("setuid").metadata().unwrap().mode() & 0o7777, 0o4755);
}

async fn unchanged_files_keep_capabilities_modes_and_links(release: Release) {
    let (_lab, root) = run_changed(release, "true").await;
    let data = root.join("data");
    let capability = xattr::get(data.join("capable"), "security.capability").unwrap();
    assert_eq!(capability.unwrap(), CAPABILITY);
    assert_eq!(data.join("setuid").metadata().unwrap().mode() & 0o7777, 0o4755);
    let inode = |name: &str| data.join(name).metadata().unwrap().ino();
    assert_eq!(inode("dir/a"), inode("dir/hard"));
}

async fn file_modes_apply_to_other_users(release: Release) {
    let (lab, image) = start_system(release).await;
    let script = "id -u; cat /data/hello; cat /data/secret 2>/dev/null || echo refused; \
        echo x 2>/dev/null > /data/hello || echo refused; echo x > /tmp/x && cat /tmp/x";
    let args = [
        "run",
        "--rm",
        "--network",
        "none",
        "--user",
        "1000",
        &image,
        "sh",
        "-c",
        script,
    ];
    assert_eq!(lab.podman.run(&args), "1000\nhello\nrefused\nrefused\nx");
}

async fn read_only_container_rejects_writes(release: Release) {
    let (lab, image) = start_system(release).await;
    let script = "cat /data/hello; echo x 2>/dev/null > /data/hello || echo refused";
    let args = [
        "run",
        "--rm",
        "--network",
        "none",
        "--read-only",
        &image,
        "sh",
        "-c",
        script,
    ];
    assert_eq!(lab.podman.run(&args), "hello\nrefused");
}

async fn podman_cp_copies_in_both_directions(release: Release) {
    let (lab, image) = start_system(release).await;
    lab.podman.run(&[
        "create",
        "--name",
        "made",
        "--network",
        "none",
        &image,
        "cat",
        "/data/new",
        "/data/hello",
    ]);
    let out = lab.new_path();
    lab.podman.run(&["cp", "made:/data/dir", out.to_str().unwrap()]);
    assert_eq!(fs::read_to_string(out.join("sub/b")).unwrap(), "b\n");
    let new = lab.new_path();
    fs::write(&new, "new\n").unwrap();
    lab.podman.run(&["cp", new.to_str().unwrap(), "made:/data/new"]);
    assert_eq!(lab.podman.run(&["start", "--attach", "made"]), "new\nhello");
}

async fn podman_diff_lists_changes(release: Release) {
    let (lab, _) = run_changed(release, "echo x > /data/new; rm /data/hello").await;
    let changes = lab.podman.run(&["diff", "changed"]);
    assert!(
        changes.contains("A /data/new") && changes.contains("D /data/hello"),
        "{changes}"
    );
}

async fn published_layer_rejects_writes(release: Release) {
    let lab = PodmanLab::start(release);
    let built = lab.build(&[lab.layer(system)], &BuildOptions::default());
    let image = lab.push(&built, "system", "1").await;
    lab.podman.run(&["pull", &image]);
    let diff = lab.serve.layer(&image, &built.bootstrap_blob().unwrap().digest).diff();
    let read_only = Some(libc::EROFS);
    assert_eq!(File::create(diff.join("new")).unwrap_err().raw_os_error(), read_only);
    assert_eq!(
        File::create(diff.join("data/hello")).unwrap_err().raw_os_error(),
        read_only
    );
    assert_eq!(
        fs::remove_file(diff.join("data/hello")).unwrap_err().raw_os_error(),
        read_only
    );
}
