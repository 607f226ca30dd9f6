//! Messages of the FUSE protocol, as in the kernel's `include/uapi/linux/fuse.h`. Only what a read-only file system
//! needs.

use std::time::Duration;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::vfs::{Attr, Entry, FsStat};

/// Major version of the protocol.
pub(super) const MAJOR: u32 = 7;
/// Minor version of the protocol used here. Newer replies are not used.
pub(super) const MINOR: u32 = 41;
/// Oldest minor version: Linux 5.4.
pub(super) const MIN_MINOR: u32 = 31;

/// Operation codes (`enum fuse_opcode`).
pub(super) mod op {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const REMOVEXATTR: u32 = 24;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const TMPFILE: u32 = 51;
}

/// Capabilities of INIT.
pub(super) mod init_flag {
    pub const ASYNC_READ: u64 = 1;
    pub const DO_READDIRPLUS: u64 = 1 << 13;
    pub const READDIRPLUS_AUTO: u64 = 1 << 14;
    pub const NO_OPEN_SUPPORT: u64 = 1 << 17;
    pub const PARALLEL_DIROPS: u64 = 1 << 18;
    pub const POSIX_ACL: u64 = 1 << 20;
    pub const MAX_PAGES: u64 = 1 << 22;
    pub const CACHE_SYMLINKS: u64 = 1 << 23;
    pub const NO_OPENDIR_SUPPORT: u64 = 1 << 24;
    pub const EXPLICIT_INVAL_DATA: u64 = 1 << 25;
    pub const INIT_EXT: u64 = 1 << 30;
    /// Unanswered requests can be sent again, with [`super::NOTIFY_RESEND`] (Linux 6.9).
    pub const HAS_RESEND: u64 = 1 << 39;
    /// Mounts can be id-mapped (Linux 6.12).
    pub const ALLOW_IDMAP: u64 = 1 << 40;
}

/// Notification that makes the kernel send again all requests that were read and not answered. Goes in the place of an
/// error number.
pub(super) const NOTIFY_RESEND: i32 = 7;

/// `struct fuse_in_header`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct InHeader {
    pub len: u32,
    pub opcode: u32,
    pub unique: u64,
    pub node: u64,
    pub uid: u32,
    pub gid: u32,
    /// The requesting thread, in the PID namespace of the mounting process; 0 if it is not visible there.
    pub pid: u32,
    pub extension_len: u16,
    pub padding: u16,
}

/// `struct fuse_out_header`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct OutHeader {
    pub len: u32,
    pub error: i32,
    pub unique: u64,
}

/// `struct fuse_init_in` up to `flags2`.
#[derive(Debug, Clone, Copy, FromBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct InitIn {
    pub major: u32,
    pub minor: u32,
    pub max_readahead: u32,
    pub flags: u32,
    pub flags2: u32,
}

/// `struct fuse_init_out`.
#[derive(Debug, Clone, Copy, Default, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct InitOut {
    pub major: u32,
    pub minor: u32,
    pub max_readahead: u32,
    pub flags: u32,
    pub max_background: u16,
    pub congestion_threshold: u16,
    pub max_write: u32,
    pub time_granularity: u32,
    pub max_pages: u16,
    pub map_alignment: u16,
    pub flags2: u32,
    pub unused: [u32; 7],
}

/// `struct fuse_read_in`.
#[derive(Debug, Clone, Copy, FromBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct ReadIn {
    pub handle: u64,
    pub offset: u64,
    pub size: u32,
    pub read_flags: u32,
    pub lock_owner: u64,
    pub flags: u32,
    pub padding: u32,
}

/// `struct fuse_getxattr_in`.
#[derive(Debug, Clone, Copy, FromBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct XattrIn {
    pub size: u32,
    pub padding: u32,
}

/// `struct fuse_getxattr_out`.
#[derive(Debug, Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct XattrOut {
    pub size: u32,
    pub padding: u32,
}

/// `struct fuse_forget_one`.
#[derive(Debug, Clone, Copy, FromBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct ForgetOne {
    pub node: u64,
    pub lookups: u64,
}

/// `struct fuse_attr`.
#[derive(Debug, Clone, Copy, Default, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct AttrOut {
    ino: u64,
    size: u64,
    blocks: u64,
    times: [u64; 3],
    time_nanos: [u32; 3],
    mode: u32,
    nlink: u32,
    uid: u32,
    gid: u32,
    rdev: u32,
    block_size: u32,
    flags: u32,
}

impl From<&Attr> for AttrOut {
    fn from(attr: &Attr) -> Self {
        Self {
            ino: attr.node,
            size: attr.size,
            blocks: attr.size.div_ceil(512),
            // The kernel takes the 64 bits as a signed number of seconds.
            times: [attr.mtime.cast_unsigned(); 3],
            time_nanos: [attr.mtime_nsec; 3],
            mode: attr.mode,
            nlink: attr.nlink,
            uid: attr.uid,
            gid: attr.gid,
            rdev: attr.rdev,
            block_size: 4096,
            flags: 0,
        }
    }
}

/// A reply to GETATTR: `struct fuse_attr_out`.
#[derive(Debug, Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct GetattrOut {
    valid: u64,
    valid_nanos: u32,
    dummy: u32,
    attr: AttrOut,
}

impl GetattrOut {
    pub fn new(attr: &Attr, ttl: Duration) -> Self {
        Self {
            valid: ttl.as_secs(),
            valid_nanos: ttl.subsec_nanos(),
            dummy: 0,
            attr: attr.into(),
        }
    }
}

/// `struct fuse_entry_out`.
#[derive(Debug, Clone, Copy, Default, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct EntryOut {
    node: u64,
    generation: u64,
    entry_valid: u64,
    attr_valid: u64,
    entry_valid_nanos: u32,
    attr_valid_nanos: u32,
    attr: AttrOut,
}

impl EntryOut {
    pub fn new(entry: &Entry, generation: u64) -> Self {
        let (seconds, nanos) = (entry.ttl.as_secs(), entry.ttl.subsec_nanos());
        // Node 0 is a negative entry, which the kernel may cache.
        let attr = entry.attr.as_ref().map(AttrOut::from).unwrap_or_default();
        Self {
            node: attr.ino,
            generation: if attr.ino == 0 { 0 } else { generation },
            entry_valid: seconds,
            attr_valid: seconds,
            entry_valid_nanos: nanos,
            attr_valid_nanos: nanos,
            attr,
        }
    }
}

/// A reply to STATFS: `struct fuse_statfs_out`.
#[derive(Debug, Clone, Copy, Default, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct StatfsOut {
    blocks: u64,
    blocks_free: u64,
    blocks_available: u64,
    files: u64,
    files_free: u64,
    block_size: u32,
    name_len: u32,
    fragment_size: u32,
    unused: [u32; 7],
}

impl From<FsStat> for StatfsOut {
    fn from(stat: FsStat) -> Self {
        Self {
            blocks: stat.bytes.div_ceil(4096),
            files: stat.files,
            block_size: 4096,
            name_len: 255,
            fragment_size: 4096,
            ..Self::default()
        }
    }
}

/// `struct fuse_dirent` without the name.
#[derive(Debug, Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
struct Dirent {
    ino: u64,
    next: u64,
    name_len: u32,
    /// As in `d_type` of readdir(3).
    kind: u32,
}

/// A directory listing: the reply to READDIR or READDIRPLUS.
pub(super) struct Listing {
    bytes: Vec<u8>,
    limit: usize,
    /// The generation of READDIRPLUS entries; `None` for READDIR.
    generation: Option<u64>,
}

impl Listing {
    /// A listing of at most `limit` bytes. With a generation, it is one of READDIRPLUS.
    pub fn new(limit: usize, generation: Option<u64>) -> Self {
        Self {
            bytes: Vec::with_capacity(limit.min(64 << 10)),
            limit,
            generation,
        }
    }

    /// Adds an entry; returns `false` if there is no room for it.
    pub fn add(&mut self, name: &[u8], attr: &Attr, next: u64, ttl: Duration) -> bool {
        let head_len = self.generation.map_or(0, |_| size_of::<EntryOut>());
        let len = (head_len + size_of::<Dirent>() + name.len()).next_multiple_of(8);
        if self.bytes.len() + len > self.limit {
            return false;
        }
        let end = self.bytes.len() + len;
        if let Some(generation) = self.generation {
            // The kernel counts a look-up for each entry with a node, and does not expect one for `.` and `..`.
            let entry = match name {
                b"." | b".." => EntryOut::default(),
                _ => EntryOut::new(&Entry { attr: Some(*attr), ttl }, generation),
            };
            self.bytes.extend_from_slice(entry.as_bytes());
        }
        let dirent = Dirent {
            ino: attr.node,
            next,
            name_len: name.len() as u32,
            kind: (attr.mode & libc::S_IFMT) >> 12,
        };
        self.bytes.extend_from_slice(dirent.as_bytes());
        self.bytes.extend_from_slice(name);
        self.bytes.resize(end, 0);
        true
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// A request: header and operands.
#[derive(Debug, Clone, Copy)]
pub(super) struct Request<'a> {
    pub header: InHeader,
    body: &'a [u8],
}

impl<'a> Request<'a> {
    /// Parses what was read from the device; `None` if it is malformed.
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        let (header, body) = InHeader::read_from_prefix(bytes).ok()?;
        (header.len as usize == bytes.len()).then_some(Self { header, body })
    }

    /// The operands as a structure, which newer kernels may extend.
    pub fn operands<T: FromBytes>(&self) -> Option<T> {
        T::read_from_prefix(self.body).ok().map(|(operands, _)| operands)
    }

    /// The name after `skip` bytes of operands, without its NUL.
    pub fn name(&self, skip: usize) -> Option<&'a [u8]> {
        let name = self.body.get(skip..)?;
        name.split(|byte| *byte == 0).next()
    }

    /// The entries of a BATCH_FORGET.
    pub fn forgotten(&self) -> impl Iterator<Item = ForgetOne> + use<'a> {
        // `struct fuse_batch_forget_in`: a count and padding, then the entries.
        let count = self.operands::<u32>().unwrap_or(0) as usize;
        let entries = self.body.get(8..).unwrap_or_default();
        let one = |bytes: &[u8]| ForgetOne::read_from_bytes(bytes).ok();
        entries.chunks_exact(size_of::<ForgetOne>()).take(count).filter_map(one)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sizes of the kernel's structures.
    #[test]
    fn structures_have_the_size_of_the_kernels() {
        assert_eq!(size_of::<InHeader>(), 40);
        assert_eq!(size_of::<OutHeader>(), 16);
        assert_eq!(size_of::<InitOut>(), 64);
        assert_eq!(size_of::<ReadIn>(), 40);
        assert_eq!(size_of::<AttrOut>(), 88);
        assert_eq!(size_of::<GetattrOut>(), 104);
        assert_eq!(size_of::<EntryOut>(), 128);
        assert_eq!(size_of::<StatfsOut>(), 80);
        assert_eq!(size_of::<Dirent>(), 24);
    }

    fn attr(node: u64) -> Attr {
        Attr {
            node,
            mode: libc::S_IFREG | 0o644,
            uid: 0,
            gid: 0,
            nlink: 1,
            size: 5,
            rdev: 0,
            mtime: -1,
            mtime_nsec: 0,
        }
    }

    #[test]
    fn listing_is_padded_and_bounded() {
        let mut listing = Listing::new(70, None);
        assert!(listing.add(b"abc", &attr(7), 1, Duration::ZERO));
        assert_eq!(listing.bytes().len(), 32);
        assert!(listing.add(b"12345678", &attr(8), 2, Duration::ZERO));
        assert!(!listing.add(b"a", &attr(9), 3, Duration::ZERO));
        assert_eq!(listing.bytes().len(), 64);
        // The kind of a regular file is DT_REG.
        assert_eq!(listing.bytes()[20..24], 8u32.to_ne_bytes());
        let mut plus = Listing::new(1000, Some(3));
        assert!(plus.add(b".", &attr(1), 1, Duration::ZERO));
        assert!(plus.add(b"a", &attr(9), 2, Duration::ZERO));
        assert_eq!(plus.bytes().len(), 2 * 160);
        assert_eq!(plus.bytes()[..8], 0u64.to_ne_bytes());
        assert_eq!(plus.bytes()[160..168], 9u64.to_ne_bytes());
    }

    #[test]
    fn malformed_requests_are_refused() {
        assert!(Request::parse(&[0; 39]).is_none());
        let mut bytes = [0; 48];
        bytes[0] = 47;
        assert!(Request::parse(&bytes).is_none());
        bytes[0] = 48;
        let request = Request::parse(&bytes).unwrap();
        assert_eq!(request.name(0), Some(&b""[..]));
        assert_eq!(request.name(9), None);
        assert!(request.operands::<ReadIn>().is_none());
        assert_eq!(request.forgotten().count(), 0);
    }
}
