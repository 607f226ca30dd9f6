//! What is mounted where.

use std::{
    fs, io,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};

use rustix::mount::UnmountFlags;

/// The file system type that our mounts show in `/proc/self/mountinfo`.
pub const FS_TYPE: &str = "fuse.nydus-store";

/// Takes off whatever a dead process left mounted on `dir`. Other mounts there are an error.
///
/// The caller holds the lock on the root, so that no live process serves `dir`.
pub fn take_over(dir: &Path) -> io::Result<()> {
    while let Some(fs_type) = mounted_on(dir)? {
        if fs_type != FS_TYPE {
            let message = format!(
                "a file system of type {fs_type} is mounted on {}: unmount it first",
                dir.display()
            );
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, message));
        }
        tracing::info!(dir = %dir.display(), "taking off the mount that an earlier process left");
        rustix::mount::unmount(dir, UnmountFlags::DETACH)?;
    }
    Ok(())
}

/// The type of the file system mounted on `dir`, if there is one.
pub fn mounted_on(dir: &Path) -> io::Result<Option<String>> {
    Ok(mount_on(dir)?.map(|mount| mount.fs_type))
}

/// The device number (`major:minor`) of what is mounted on `dir`.
pub fn device_number(dir: &Path) -> Option<String> {
    mount_on(dir).ok().flatten().map(|mount| mount.device)
}

/// Everything that is mounted in `dir` or below it, in the order of mounting.
pub fn mounted_below(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let table = fs::read("/proc/self/mountinfo")?;
    let places = table.split(|byte| *byte == b'\n').filter_map(parse);
    Ok(places
        .map(|mount| mount.place)
        .filter(|place| place.starts_with(dir))
        .collect())
}

/// A line of `/proc/self/mountinfo`.
#[derive(Debug, PartialEq, Eq)]
struct Mount {
    device: String,
    place: PathBuf,
    fs_type: String,
}

/// Does not touch the mount itself, which may be dead, or not yet served.
fn mount_on(dir: &Path) -> io::Result<Option<Mount>> {
    let parent = dir.parent().unwrap_or(Path::new("/")).canonicalize()?;
    let dir = dir.file_name().map_or(parent.clone(), |name| parent.join(name));
    let table = fs::read("/proc/self/mountinfo")?;
    // The last line for a place is the mount on top.
    Ok(table
        .split(|byte| *byte == b'\n')
        .filter_map(parse)
        .rfind(|mount| mount.place == dir))
}

/// Reads a line of `/proc/self/mountinfo` (proc_pid_mountinfo(5)).
fn parse(line: &[u8]) -> Option<Mount> {
    let text = |field: &[u8]| String::from_utf8_lossy(field).into_owned();
    let mut fields = line.split(|byte| *byte == b' ');
    let device = text(fields.nth(2)?);
    let place = unescape(fields.nth(1)?);
    let fs_type = text(fields.skip_while(|field| *field != b"-").nth(1)?);
    Some(Mount {
        device,
        place: PathBuf::from(std::ffi::OsStr::from_bytes(&place)),
        fs_type,
    })
}

/// Undoes the octal escapes of white space and backslashes.
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
    fn lines_of_mountinfo() {
        let line = br"36 35 98:0 / /a\040b\134c rw,noatime master:1 - fuse.nydus-store nydus-store rw";
        let mount = Mount {
            device: "98:0".to_owned(),
            place: r"/a b\c".into(),
            fs_type: FS_TYPE.to_owned(),
        };
        assert_eq!(parse(line), Some(mount));
    }

    #[test]
    fn what_is_mounted() {
        assert_eq!(mounted_on(Path::new("/proc")).unwrap().as_deref(), Some("proc"));
        assert_eq!(mounted_on(tempfile::tempdir().unwrap().path()).unwrap(), None);
    }
}
