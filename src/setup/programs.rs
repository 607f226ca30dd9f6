//! Finds the installed programs that use the store, and the files from which they read it.
//!
//! The version number does not decide that: upstream's Podman 5.8 reads storage.conf alone, but Debian builds Podman
//! 5.8 with a newer containers/storage. So this module searches the executable for a function name.

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use memchr::memmem::Finder;

use super::{SetupError, layout::Layout};
use crate::doctor::{command, kernel};

/// Directories of programs, in the order of the usual PATH.
const DIRS: [&str; 4] = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin"];
/// A function of containers/storage 1.63 and later, in the package that reads storage.rootful.conf.d. Go executables
/// contain function names even if they are stripped.
const READS_ROOTFUL: &str = "storage/pkg/configfile.ParseTOML";
/// First version that reads storage.rootful.conf.d; decides if the program is a wrapper script.
const ROOTFUL_FROM: (u32, u32) = (5, 8);
const ELF: &[u8] = b"\x7fELF";
const VERSION_TIMEOUT: Duration = Duration::from_secs(20);

/// An installed program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// Path on the host to set up.
    pub path: PathBuf,
    /// Whether it reads storage.rootful.conf.d.
    pub reads_rootful: bool,
}

/// The installed programs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Programs {
    /// Podman.
    pub podman: Option<Program>,
    /// CRI-O.
    pub crio: Option<Program>,
    /// Whether CRI-O is installed, or /etc/crio exists.
    pub has_crio: bool,
}

/// The files that must name the image store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StorePlacement {
    /// storage.rootful.conf.d, which only root's programs read, instead of storage.conf.
    pub rootful: bool,
    /// Also CRI-O's own configuration, because CRI-O does not read storage.rootful.conf.d.
    pub crio: bool,
}

impl Programs {
    /// Finds the programs of the host or sysroot.
    pub fn find(layout: &Layout) -> Result<Self, SetupError> {
        let find = |name: &str| {
            let mut paths = DIRS.iter().map(|dir| Path::new(dir).join(name));
            let path = paths.find(|path| layout.in_sysroot(path).is_file());
            path.map(|path| Program::inspect(layout, path)).transpose()
        };
        let (podman, crio) = (find("podman")?, find("crio")?);
        let has_crio = crio.is_some() || layout.crio.is_dir();
        Ok(Self { podman, crio, has_crio })
    }

    /// The files from which these programs read the image store.
    ///
    /// A Podman that reads storage.rootful.conf.d also reads storage.conf for other users than root. Their commands
    /// would all fail if storage.conf named the store, which they cannot access.
    pub fn placement(&self) -> StorePlacement {
        let reads = |program: &Option<Program>| program.as_ref().is_some_and(|program| program.reads_rootful);
        let first = if self.podman.is_some() {
            &self.podman
        } else {
            &self.crio
        };
        let rootful = reads(first);
        StorePlacement {
            rootful,
            crio: rootful && self.has_crio && !reads(&self.crio),
        }
    }
}

impl Program {
    fn inspect(layout: &Layout, path: PathBuf) -> Result<Self, SetupError> {
        let read = |source| SetupError::Read {
            path: path.clone(),
            source,
        };
        let mut file = File::open(layout.in_sysroot(&path)).map_err(read)?;
        let reads_rootful = match contains(&mut file, READS_ROOTFUL.as_bytes()).map_err(read)? {
            Some(found) => found,
            None => layout.is_host() && version_reads_rootful(&path),
        };
        Ok(Self { path, reads_rootful })
    }
}

fn version_reads_rootful(path: &Path) -> bool {
    let printed = command::run(Command::new(path).arg("--version"), VERSION_TIMEOUT);
    let version = printed
        .ok()
        .and_then(|printed| kernel::major_minor(printed.stdout.split_whitespace().last()?));
    version.is_some_and(|version| version >= ROOTFUL_FROM)
}

/// Whether an ELF executable contains the bytes `wanted`; `None` if the file is not ELF.
fn contains(file: &mut impl Read, wanted: &[u8]) -> io::Result<Option<bool>> {
    let finder = Finder::new(wanted);
    // Keeps the last `wanted.len()` bytes of each part, to find matches across parts.
    let mut buffer = vec![0; (1 << 20) + wanted.len()];
    let (mut filled, mut first) = (0, true);
    loop {
        let read = file.read(&mut buffer[filled..])?;
        filled += read;
        let full = filled == buffer.len();
        if read != 0 && !full {
            continue;
        }
        let part = &buffer[..filled];
        if first && !part.starts_with(ELF) {
            return Ok(None);
        }
        first = false;
        if finder.find(part).is_some() {
            return Ok(Some(true));
        }
        if read == 0 {
            return Ok(Some(false));
        }
        let kept = filled - wanted.len();
        buffer.copy_within(kept.., 0);
        filled = wanted.len();
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn function_name_is_found_across_buffer_parts() {
        for offset in [4, (1 << 20) - 5, 1 << 20, (1 << 20) + 10, 3 << 20] {
            let mut bytes = vec![b'x'; offset];
            bytes[..4].copy_from_slice(ELF);
            bytes.extend_from_slice(READS_ROOTFUL.as_bytes());
            let found = |bytes: &[u8]| contains(&mut &*bytes, READS_ROOTFUL.as_bytes()).unwrap();
            assert_eq!(found(&bytes), Some(true), "{offset}");
            bytes.pop();
            assert_eq!(found(&bytes), Some(false), "{offset}");
        }
        assert_eq!(contains(&mut &b"#!/bin/sh\n"[..], b"x").unwrap(), None);
    }

    #[test]
    fn placement_follows_podman_and_then_crio() {
        let tree = tempfile::tempdir().unwrap();
        let layout = Layout::new(Some(tree.path()), |_| None);
        let write = |path: &str, reads: bool| {
            let path = tree.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            let name = if reads { READS_ROOTFUL } else { "" };
            fs::write(path, [ELF, name.as_bytes()].concat()).unwrap();
        };
        let placement = || {
            let StorePlacement { rootful, crio } = Programs::find(&layout).unwrap().placement();
            (rootful, crio)
        };
        assert_eq!(placement(), (false, false));
        write("usr/bin/podman", true);
        assert_eq!(placement(), (true, false));
        write("usr/local/bin/crio", false);
        assert_eq!(placement(), (true, true));
        write("usr/local/bin/crio", true);
        assert_eq!(placement(), (true, false));
        write("usr/bin/podman", false);
        assert_eq!(placement(), (false, false));
        fs::remove_file(tree.path().join("usr/bin/podman")).unwrap();
        assert_eq!(placement(), (true, false));
        fs::remove_file(tree.path().join("usr/local/bin/crio")).unwrap();
        fs::create_dir_all(tree.path().join("etc/crio")).unwrap();
        assert!(Programs::find(&layout).unwrap().has_crio);
        assert_eq!(placement(), (false, false));
    }
}
