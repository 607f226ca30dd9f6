use nydus_store::fixtures::*;
#[tokio::test]
#[ignore]
async fn lab() {
    let dir = std::path::Path::new("/tmp/lab/img");
    let _ = std::fs::remove_dir_all(dir);
    std::fs::create_dir_all(dir.join("tree")).unwrap();
    big_tree(&dir.join("tree"), 300 << 20).unwrap();
    let bin = dir.join("tree/bin"); std::fs::create_dir_all(&bin).unwrap();
    std::fs::copy("/bin/busybox", bin.join("busybox")).unwrap();
    for n in ["sh","echo","ls","cat","id","true","touch"] { std::os::unix::fs::symlink("busybox", bin.join(n)).unwrap(); }
    let mut o = BuildOptions::default();
    o.image.cmd = vec!["/bin/sh".into()];
    let img = build(&[LayerSource::Dir(dir.join("tree"))], &o, &dir.join("out")).unwrap();
    img.push("http://127.0.0.1:5000", "lab/big", "v1").await.unwrap();
    println!("{}", img.manifest_digest());
}
