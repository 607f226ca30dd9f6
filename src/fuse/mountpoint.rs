//! Reads the mount table and removes stale mounts.

use std::{
    fs, io,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};

use rustix::mount::UnmountFlags;

/// File system type of this program's mounts in `/proc/self/mountinfo`.
pub const FS_TYPE: &str = "fuse.nydus-store";

/// Removes mounts that a dead process left on `dir`. Other mounts there are an error.
///
/// The caller holds the lock on the root, so no live process serves `dir`.
pub fn remove_stale_mounts(dir: &Path) -> io::Result<()> {
    while let Some(fs_type) = mounted_on(dir)? {
        if fs_type != FS_TYPE {
            let message = format!(
                "a file system of type {fs_type} is mounted on {}; unmount it first",
                dir.display()
            );
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, message));
        }
        tracing::info!(dir = %dir.display(), "removing stale mount");
        rustix::mount::unmount(dir, UnmountFlags::DETACH)?;
    }
    Ok(())
}

/// Type of the file system mounted on `dir`, if there is one.
pub fn mounted_on(dir: &Path) -> io::Result<Option<String>> {
    Ok(mount_on(dir)?.map(|mount| mount.fs_type))
}

/// Device number (`major:minor`) of the file system mounted on `dir`.
pub fn device_number(dir: &Path) -> Option<String> {
    mount_on(dir).ok().flatten().map(|mount| mount.device)
}

/// Mount points in `dir` and below it, in the order of mounting.
pub fn mounted_below(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let table = fs::read("/proc/self/mountinfo")?;
    let entries = table.split(|byte| *byte == b'\n').filter_map(parse);
    Ok(entries
        .map(|mount| mount.mount_point)
        .filter(|mount_point| mount_point.starts_with(dir))
        .collect())
}

/// A line of `/proc/self/mountinfo`.
#[derive(Debug, PartialEq, Eq)]
struct MountEntry {
    device: String,
    mount_point: PathBuf,
    fs_type: String,
}

/// Finds the topmost mount on `dir`. Does not access the mount, which may be dead or not served yet.
fn mount_on(dir: &Path) -> io::Result<Option<MountEntry>> {
    let parent = dir.parent().unwrap_or(Path::new("/")).canonicalize()?;
    let dir = dir.file_name().map_or(parent.clone(), |name| parent.join(name));
    let table = fs::read("/proc/self/mountinfo")?;
    // The last line for a mount point is the topmost mount.
    Ok(table
        .split(|byte| *byte == b'\n')
        .filter_map(parse)
        .rfind(|mount| mount.mount_point == dir))
}

/// Parses a line of `/proc/self/mountinfo` (proc_pid_mountinfo(5)).
fn parse(line: &[u8]) -> Option<MountEntry> {
    let text = |field: &[u8]| String::from_utf8_lossy(field).into_owned();
    let mut fields = line.split(|byte| *byte == b' ');
    let device = text(fields.nth(2)?);
    let mount_point = unescape(fields.nth(1)?);
    let fs_type = text(fields.skip_while(|field| *field != b"-").nth(1)?);
    Some(MountEntry {
        device,
        mount_point: PathBuf::from(std::ffi::OsStr::from_bytes(&mount_point)),
        fs_type,
    })
}

/// Decodes the octal escapes of white space and backslashes.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((byte, after)) = rest.split_first() {
        let octal = after
            .get(..3)
            .filter(|_| *byte == b'\\')
            .and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(escaped) => {
                plain.push(escaped);
                rest = &after[3..];
            }
            None => {
                plain.push(*byte);
                rest = after;
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_line_is_parsed() {
        let line = br"36 35 98:0 / /a\040b\134c rw,noatime master:1 - fuse.nydus-store nydus-store rw";
        let mount = MountEntry {
            device: "98:0".to_owned(),
            mount_point: r"/a b\c".into(),
            fs_type: FS_TYPE.to_owned(),
        };
        assert_eq!(parse(line), Some(mount));
    }

    #[test]
    fn mounted_file_system_is_found() {
        assert_eq!(mounted_on(Path::new("/proc")).unwrap().as_deref(), Some("proc"));
        assert_eq!(mounted_on(tempfile::tempdir().unwrap().path()).unwrap(), None);
    }
}
