//! Checked reading of little-endian records from untrusted bytes.

use super::error::FormatError;

const BEYOND: FormatError = FormatError::malformed("points beyond the end of the bootstrap");

/// The bytes of a bootstrap; every access is checked.
#[derive(Clone, Copy)]
pub(super) struct BootstrapBytes<'a>(pub(super) &'a [u8]);

impl<'a> BootstrapBytes<'a> {
    /// `len` bytes at offset `at`.
    pub(super) fn slice(&self, at: u64, len: u64) -> Result<&'a [u8], FormatError> {
        let end = at.checked_add(len).ok_or(BEYOND)?;
        // The conversions cannot truncate to a value in range: `usize` has 64 bits, or the file fits into 32.
        let (Ok(at), Ok(end)) = (usize::try_from(at), usize::try_from(end)) else {
            return Err(BEYOND);
        };
        self.0.get(at..end).ok_or(BEYOND)
    }

    /// A record of `len` bytes at offset `at`, to be read field by field.
    pub(super) fn record(&self, at: u64, len: u64) -> Result<Fields<'a>, FormatError> {
        self.slice(at, len).map(Fields)
    }

    /// Length of the bootstrap in bytes.
    pub(super) const fn len(&self) -> u64 {
        self.0.len() as u64
    }
}

/// The fields of a record that have not been read yet.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl<'a> Fields<'a> {
    /// The next `len` bytes.
    pub(super) fn bytes(&mut self, len: usize) -> Result<&'a [u8], FormatError> {
        let (head, tail) = self
            .0
            .split_at_checked(len)
            .ok_or(FormatError::malformed("a record ends early"))?;
        self.0 = tail;
        Ok(head)
    }

    /// The next `N` bytes as an array.
    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], FormatError> {
        let (head, tail) = self
            .0
            .split_first_chunk::<N>()
            .ok_or(FormatError::malformed("a record ends early"))?;
        self.0 = tail;
        Ok(*head)
    }

    pub(super) fn u8(&mut self) -> Result<u8, FormatError> {
        self.array::<1>().map(|[byte]| byte)
    }

    pub(super) fn u16(&mut self) -> Result<u16, FormatError> {
        self.array().map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, FormatError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, FormatError> {
        self.array().map(u64::from_le_bytes)
    }
}
