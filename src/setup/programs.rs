//! Which of the programs that use the stores are installed, and from which files they read the stores.
//!
//! The version does not tell the latter: Podman 5.8 as its developers build it reads storage.conf alone, while Debian
//! builds the same version with a newer containers/storage. So the program itself is looked into.

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use memchr::memmem::Finder;

use super::{Error, layout::Layout};
use crate::doctor::{command, kernel};

/// Where programs are, in the order of the usual PATH.
const DIRS: [&str; 4] = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin"];
/// A function of the package by which containers/storage, from 1.63 on, reads storage.rootful.conf.d. A program made of
/// Go has the names of its functions in it, stripped or not.
const READS_ROOTFUL: &str = "storage/pkg/configfile.ParseTOML";
/// For what is no such program, but a script that starts one.
const ROOTFUL_FROM: (u32, u32) = (5, 8);
const ELF: &[u8] = b"\x7fELF";
const PATIENCE: Duration = Duration::from_secs(20);

/// An installed program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// Where it is.
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
    /// Whether this is a host for CRI-O, be it installed yet or not.
    pub has_crio: bool,
}

/// Where the image store is to be named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Whether in storage.rootful.conf.d, which only root's programs read, rather than in storage.conf.
    pub rootful: bool,
    /// Whether in CRI-O's own configuration too, since it does not read the former.
    pub crio: bool,
}

impl Programs {
    /// Looks for the programs of a host, or of its tree of files.
    pub fn find(layout: &Layout) -> Result<Self, Error> {
        let find = |name: &str| {
            let mut paths = DIRS.iter().map(|dir| Path::new(dir).join(name));
            let path = paths.find(|path| layout.at(path).is_file());
            path.map(|path| Program::look_into(layout, path)).transpose()
        };
        let (podman, crio) = (find("podman")?, find("crio")?);
        let has_crio = crio.is_some() || layout.crio.is_dir();
        Ok(Self { podman, crio, has_crio })
    }

    /// Where these programs read the image store.
    ///
    /// A Podman that reads storage.rootful.conf.d reads storage.conf for users other than root too, and none of their
    /// commands works if that names a store that is closed to them.
    pub fn place(&self) -> Place {
        let reads = |program: &Option<Program>| program.as_ref().is_some_and(|program| program.reads_rootful);
        let first = if self.podman.is_some() {
            &self.podman
        } else {
            &self.crio
        };
        let rootful = reads(first);
        Place {
            rootful,
            crio: rootful && self.has_crio && !reads(&self.crio),
        }
    }
}

impl Program {
    fn look_into(layout: &Layout, path: PathBuf) -> Result<Self, Error> {
        let read = |source| Error::Read {
            path: path.clone(),
            source,
        };
        let mut file = File::open(layout.at(&path)).map_err(read)?;
        let reads_rootful = match contains(&mut file, READS_ROOTFUL.as_bytes()).map_err(read)? {
            Some(found) => found,
            None => layout.is_host() && version_reads_rootful(&path),
        };
        Ok(Self { path, reads_rootful })
    }
}

fn version_reads_rootful(path: &Path) -> bool {
    let printed = command::run(Command::new(path).arg("--version"), PATIENCE);
    let version = printed
        .ok()
        .and_then(|printed| kernel::number(printed.stdout.split_whitespace().last()?));
    version.is_some_and(|version| version >= ROOTFUL_FROM)
}

/// Whether a program contains some bytes; nothing if the file is not a program for the kernel.
fn contains(file: &mut impl Read, wanted: &[u8]) -> io::Result<Option<bool>> {
    let finder = Finder::new(wanted);
    // The end of the part before stays at its start.
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
    fn name_is_found_across_parts() {
        for place in [4, (1 << 20) - 5, 1 << 20, (1 << 20) + 10, 3 << 20] {
            let mut bytes = vec![b'x'; place];
            bytes[..4].copy_from_slice(ELF);
            bytes.extend_from_slice(READS_ROOTFUL.as_bytes());
            let found = |bytes: &[u8]| contains(&mut &*bytes, READS_ROOTFUL.as_bytes()).unwrap();
            assert_eq!(found(&bytes), Some(true), "{place}");
            bytes.pop();
            assert_eq!(found(&bytes), Some(false), "{place}");
        }
        assert_eq!(contains(&mut &b"#!/bin/sh\n"[..], b"x").unwrap(), None);
    }

    #[test]
    fn place_follows_podman_and_then_crio() {
        let tree = tempfile::tempdir().unwrap();
        let layout = Layout::new(Some(tree.path()), |_| None);
        let write = |path: &str, reads: bool| {
            let path = tree.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            let name = if reads { READS_ROOTFUL } else { "" };
            fs::write(path, [ELF, name.as_bytes()].concat()).unwrap();
        };
        let place = || {
            let Place { rootful, crio } = Programs::find(&layout).unwrap().place();
            (rootful, crio)
        };
        assert_eq!(place(), (false, false));
        write("usr/bin/podman", true);
        assert_eq!(place(), (true, false));
        write("usr/local/bin/crio", false);
        assert_eq!(place(), (true, true));
        write("usr/local/bin/crio", true);
        assert_eq!(place(), (true, false));
        write("usr/bin/podman", false);
        assert_eq!(place(), (false, false));
        fs::remove_file(tree.path().join("usr/bin/podman")).unwrap();
        assert_eq!(place(), (true, false));
        fs::remove_file(tree.path().join("usr/local/bin/crio")).unwrap();
        fs::create_dir_all(tree.path().join("etc/crio")).unwrap();
        assert!(Programs::find(&layout).unwrap().has_crio);
        assert_eq!(place(), (false, false));
    }
}
