//! Builds a static program of about 190 bytes, so that the image's container needs no shell and no library.
//!
//! The program does what `cat PATH` does: `sendfile(1, openat(AT_FDCWD, PATH, O_RDONLY), NULL, 4096); exit(0)`. The
//! file consists of an ELF header, one program header that maps the whole file, the machine code and the path.

/// Load address; a multiple of any page size.
const BASE: u64 = 0x40_0000;
const FILE_HEADER: u16 = 64;
const PROGRAM_HEADER: u16 = 56;
const PAGE: u64 = 0x1_0000;

/// The ELF machine number (`e_machine`) and the code. The code expects the path directly behind it.
#[cfg(target_arch = "x86_64")]
const MACHINE: Option<(u16, &[u8])> = Some((
    62,
    &[
        0xbf, 0x9c, 0xff, 0xff, 0xff, // mov edi, AT_FDCWD
        0x48, 0x8d, 0x35, 0x28, 0x00, 0x00, 0x00, // lea rsi, [path]
        0x31, 0xd2, // xor edx, edx
        0xb8, 0x01, 0x01, 0x00, 0x00, // mov eax, 257 (openat)
        0x0f, 0x05, // syscall
        0xbf, 0x01, 0x00, 0x00, 0x00, // mov edi, 1
        0x89, 0xc6, // mov esi, eax
        0x31, 0xd2, // xor edx, edx
        0x41, 0xba, 0x00, 0x10, 0x00, 0x00, // mov r10d, 4096
        0xb8, 0x28, 0x00, 0x00, 0x00, // mov eax, 40 (sendfile)
        0x0f, 0x05, // syscall
        0x31, 0xff, // xor edi, edi
        0xb8, 0x3c, 0x00, 0x00, 0x00, // mov eax, 60 (exit)
        0x0f, 0x05, // syscall
    ],
));
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
const MACHINE: Option<(u16, &[u8])> = Some((183, AARCH64));
#[cfg(not(any(target_arch = "x86_64", all(target_arch = "aarch64", target_endian = "little"))))]
const MACHINE: Option<(u16, &[u8])> = None;

#[cfg(any(test, all(target_arch = "aarch64", target_endian = "little")))]
const AARCH64: &[u8] = &[
    0x60, 0x0c, 0x80, 0x12, // mov w0, AT_FDCWD
    0xa1, 0x01, 0x00, 0x10, // adr x1, path
    0x02, 0x00, 0x80, 0x52, // mov w2, 0
    0x08, 0x07, 0x80, 0x52, // mov w8, 56 (openat)
    0x01, 0x00, 0x00, 0xd4, // svc 0
    0xe1, 0x03, 0x00, 0x2a, // mov w1, w0
    0x20, 0x00, 0x80, 0x52, // mov w0, 1
    0x02, 0x00, 0x80, 0xd2, // mov x2, 0
    0x03, 0x00, 0x82, 0xd2, // mov x3, 4096
    0xe8, 0x08, 0x80, 0x52, // mov w8, 71 (sendfile)
    0x01, 0x00, 0x00, 0xd4, // svc 0
    0x00, 0x00, 0x80, 0x52, // mov w0, 0
    0xa8, 0x0b, 0x80, 0x52, // mov w8, 93 (exit)
    0x01, 0x00, 0x00, 0xd4, // svc 0
];

/// Builds a program that prints the file `path`; `None` on unsupported architectures.
pub fn program_printing(path: &str) -> Option<Vec<u8>> {
    MACHINE.map(|(machine, code)| elf(machine, code, path))
}

fn elf(machine: u16, code: &[u8], path: &str) -> Vec<u8> {
    let (start, path_end) = (FILE_HEADER + PROGRAM_HEADER, [0]);
    let size = u64::from(start) + (code.len() + path.len() + path_end.len()) as u64;
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec(); // 64 bit, little-endian, version 1
    let half = |value: u16, elf: &mut Vec<u8>| elf.extend(value.to_le_bytes());
    half(2, &mut elf); // an executable
    half(machine, &mut elf);
    elf.extend(1u32.to_le_bytes());
    for long in [BASE + u64::from(start), u64::from(FILE_HEADER), 0] {
        elf.extend(long.to_le_bytes()); // entry point, offset of program headers, no section headers
    }
    elf.extend(0u32.to_le_bytes());
    for value in [FILE_HEADER, PROGRAM_HEADER, 1, 0, 0, 0] {
        half(value, &mut elf);
    }
    for word in [1u32, 5] {
        elf.extend(word.to_le_bytes()); // load it; readable and executable
    }
    for long in [0, BASE, BASE, size, size, PAGE] {
        elf.extend(long.to_le_bytes()); // offset, address (twice), size in file and in memory, alignment
    }
    [elf.as_slice(), code, path.as_bytes(), &path_end].concat()
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::PermissionsExt as _, process::Command};

    use super::*;

    #[test]
    fn program_prints_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let (text, program) = (dir.path().join("text"), dir.path().join("program"));
        std::fs::write(&text, "what is in the file\n").unwrap();
        let Some(bytes) = program_printing(text.to_str().unwrap()) else {
            return;
        };
        std::fs::write(&program, bytes).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        let output = Command::new(&program).output().unwrap();
        assert!(output.status.success(), "{}", output.status);
        assert_eq!(output.stdout, b"what is in the file\n");
    }

    #[test]
    fn aarch64_program_has_code_and_path_in_place() {
        let bytes = elf(183, AARCH64, "/x");
        assert_eq!(bytes.len(), 120 + AARCH64.len() + 3);
        assert_eq!(&bytes[120..124], &AARCH64[..4]);
        assert!(bytes.ends_with(b"/x\0"));
    }
}
