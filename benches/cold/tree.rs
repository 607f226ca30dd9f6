//! Collects the files of images: programs of this machine with their dependencies, and a part of its system.

use std::{
    fs::{self, File},
    io::Read as _,
    path::{Path, PathBuf},
    process::Command,
};

use crate::common;

/// Copies system files of this machine up to `bytes` bytes. The selection is reproducible on this machine and typical
/// of images.
pub fn system(tree: &Path, bytes: u64) -> anyhow::Result<()> {
    let mut left = bytes;
    for entry in walkdir::WalkDir::new("/usr").sort_by_file_name().into_iter().flatten() {
        let to = tree.join(entry.path().strip_prefix("/")?);
        let size = entry.metadata().map_or(0, |metadata| metadata.len());
        // Skips huge files, which are not typical of images.
        if !entry.file_type().is_file() || to.exists() || size > 64 << 20 {
            continue;
        }
        fs::create_dir_all(to.parent().unwrap_or(tree))?;
        fs::copy(entry.path(), to)?;
        left = left.saturating_sub(size);
        if left == 0 {
            break;
        }
    }
    Ok(())
}

/// Creates the mount points of programs.rs.
pub fn mount_points(tree: &Path) -> anyhow::Result<()> {
    for dir in ["dev", "proc", "tmp"] {
        fs::create_dir_all(tree.join(dir))?;
    }
    for device in ["null", "random", "urandom"] {
        File::create(tree.join("dev").join(device))?;
    }
    Ok(())
}

/// Copies this machine's python3 with its library to `/python3`.
pub fn python(tree: &Path) -> anyhow::Result<()> {
    let script = "import sys, sysconfig; print(sys.executable); print(sysconfig.get_path('stdlib'))";
    let told = common::output(Command::new("/usr/bin/python3").args(["-c", script]));
    let mut lines = told.lines().map(PathBuf::from);
    let (program, library) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
    let objects = fs::read_dir(library.join("lib-dynload"))?.flatten();
    let mut wanted: Vec<_> = objects.map(|entry| entry.path()).collect();
    wanted.push(program.clone());
    copy_libraries(tree, &wanted)?;
    copy(tree, &library)?;
    copy(tree, &program)?;
    fs::rename(in_tree(tree, &program), tree.join("python3"))?;
    Ok(())
}

/// Copies this machine's nginx and a page. Returns whether nginx is installed.
pub fn nginx(tree: &Path) -> anyhow::Result<bool> {
    let paths = ["/usr/sbin/nginx", "/etc/nginx/mime.types", "/usr/share/nginx/html"].map(Path::new);
    if !paths.iter().all(|path| path.exists()) {
        return Ok(false);
    }
    for path in paths {
        copy(tree, path)?;
    }
    copy_libraries(tree, &[PathBuf::from(paths[0])])?;
    fs::write(tree.join("etc/passwd"), "root:x:0:0:root:/:/bin/false\n")?;
    fs::write(tree.join("etc/group"), "root:x:0:\n")?;
    Ok(true)
}

/// Copies this machine's Java runtime to `/java`. Returns whether it is installed.
pub fn java(tree: &Path) -> anyhow::Result<bool> {
    let Ok(program) = fs::canonicalize("/usr/bin/keytool") else {
        return Ok(false);
    };
    let Some(home) = program.parent().and_then(Path::parent) else {
        return Ok(false);
    };
    for part in ["bin", "conf", "lib"] {
        copy(tree, &home.join(part))?;
    }
    let objects = walkdir::WalkDir::new(home.join("lib")).into_iter().flatten();
    let objects = objects
        .map(walkdir::DirEntry::into_path)
        .filter(|path| path.extension().is_some_and(|extension| extension == "so"));
    copy_libraries(tree, &objects.chain([program.clone()]).collect::<Vec<_>>())?;
    fs::rename(in_tree(tree, home), tree.join("java"))?;
    Ok(true)
}

fn in_tree(tree: &Path, path: &Path) -> PathBuf {
    tree.join(path.strip_prefix("/").unwrap_or(path))
}

/// Copies the shared libraries that `objects` need.
fn copy_libraries(tree: &Path, objects: &[PathBuf]) -> anyhow::Result<()> {
    // Ignores the exit status: ldd fails if an object needs no library.
    let told = Command::new("ldd").args(objects).output()?;
    let told = String::from_utf8_lossy(&told.stdout).into_owned();
    // Skips the lines of the objects themselves, which end with a colon.
    let mut wanted: Vec<_> = told
        .split_whitespace()
        .filter(|word| word.starts_with('/') && !word.ends_with(':'))
        .collect();
    wanted.sort();
    wanted.dedup();
    wanted.into_iter().try_for_each(|path| copy(tree, Path::new(path)))
}

/// Copies a file or a directory, following links. Skips dangling links.
fn copy(tree: &Path, from: &Path) -> anyhow::Result<()> {
    for entry in walkdir::WalkDir::new(from).follow_links(true).into_iter().flatten() {
        let to = in_tree(tree, entry.path());
        if entry.file_type().is_file() && !to.exists() {
            fs::create_dir_all(to.parent().unwrap_or(tree))?;
            fs::copy(entry.path(), &to)?;
            // Preserves the modification time, by which python3 validates compiled files.
            File::open(&to)?.set_modified(entry.metadata()?.modified()?)?;
        }
    }
    Ok(())
}

/// Reads every file below `dir` in order of the tree. Returns their number and bytes.
pub fn read_all(dir: &Path) -> anyhow::Result<(usize, u64)> {
    let (mut files, mut bytes) = (0, 0);
    let mut buffer = vec![0; 1 << 20];
    for entry in walkdir::WalkDir::new(dir).sort_by_file_name() {
        let entry = entry?;
        if entry.file_type().is_file() {
            let mut file = File::open(entry.path())?;
            files += 1;
            loop {
                match file.read(&mut buffer)? {
                    0 => break,
                    len => bytes += len as u64,
                }
            }
        }
    }
    Ok((files, bytes))
}
