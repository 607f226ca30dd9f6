//! [`Recording`]: what a daemon changed on disk, in order, as strace(1) saw it.

use std::{
    collections::HashMap,
    fmt::{self, Display, Formatter},
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::{Duration, SystemTime},
};

use crate::common::{Serve, wait_until};

/// Calls that change files, and those that tell where `write` writes.
const CALLS: &str = "openat,creat,write,writev,pwrite64,pwritev,pwritev2,truncate,ftruncate,fallocate,rename,renameat,\
                     renameat2,link,linkat,unlink,unlinkat,mkdir,mkdirat,rmdir,symlink,symlinkat,fsync,fdatasync,\
                     sync_file_range,lseek,mmap,copy_file_range,sendfile,splice";

/// A change of the directory that is recorded. Paths are relative to its parent.
#[derive(Debug, Clone)]
pub enum Change {
    /// Opens a file, which is created if it is missing.
    Open { path: String, is_truncated: bool },
    /// Writes bytes at an offset.
    Write {
        path: String,
        offset: u64,
        bytes: Arc<[u8]>,
    },
    /// Sets the length.
    Truncate { path: String, len: u64 },
    /// Makes the file at least as long.
    Extend { path: String, len: u64 },
    /// Turns a range into a hole; the length stays.
    Punch { path: String, offset: u64, len: u64 },
    /// Moves a file or directory. What was there before is gone.
    Rename { from: String, to: String },
    /// Gives a file another name.
    Link { from: String, to: String },
    /// Removes a name.
    Remove { path: String },
    /// Creates a directory.
    MakeDir { path: String },
    /// A sync begins: it concerns what was changed before.
    BeginSync { path: String, number: usize },
    /// The sync of that number has succeeded.
    EndSync { path: String, number: usize },
}

impl Display for Change {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Write { path, offset, bytes } => write!(f, "Write {} bytes at {offset} of {path}", bytes.len()),
            other => write!(f, "{other:?}"),
        }
    }
}

/// A change and when the call for it began.
#[derive(Debug, Clone)]
pub struct Step {
    pub began: Duration,
    pub change: Change,
}

/// Starts daemons with their changes recorded.
pub struct Recorder {
    root: PathBuf,
    files: Vec<PathBuf>,
    dir: PathBuf,
}

impl Recorder {
    /// Records changes below the root of `serve`, in files in `dir`.
    pub fn new(serve: &Serve, dir: &Path) -> Self {
        Self {
            root: serve.root().to_owned(),
            files: Vec::new(),
            dir: dir.to_owned(),
        }
    }

    /// Starts the daemon.
    pub fn launch(&mut self, serve: &mut Serve) {
        let file = self.dir.join(format!("strace-{}", self.files.len()));
        serve.launch_with(|command| {
            let mut traced = Command::new("strace");
            // The daemon stays the child of this process (-D), and only the calls of interest stop it.
            traced.args([
                "-D",
                "-f",
                "--seccomp-bpf",
                "-ttt",
                "-y",
                "-xx",
                "-s",
                "100000000",
                "-o",
            ]);
            traced.arg(&file).args(["-e", CALLS, "--"]);
            traced.arg(command.get_program()).args(command.get_args());
            *command = traced;
        });
        self.files.push(file);
    }

    /// The changes so far. The daemon has ended.
    pub fn steps(&self, serve: &Serve) -> Vec<Step> {
        let ended = format!("{} ", serve.id());
        wait_until("strace has written everything", || {
            let text = fs::read_to_string(self.files.last()?).unwrap();
            let last = text.lines().rfind(|line| line.starts_with(&ended))?;
            (last.contains("+++ exited") || last.contains("+++ killed")).then_some(())
        });
        let mut steps = Vec::new();
        for file in &self.files {
            let mut parser = Parser::new(self.root.parent().unwrap(), steps.len());
            let text = fs::read_to_string(file).unwrap();
            text.lines().for_each(|line| parser.line(line));
            steps.append(&mut parser.steps);
        }
        steps
    }
}

/// The time now, on the clock of the steps.
pub fn now() -> Duration {
    SystemTime::UNIX_EPOCH.elapsed().unwrap()
}

/// Reads the output of strace.
struct Parser {
    base: String,
    steps: Vec<Step>,
    /// Calls that have begun, by thread: when, the text so far, and the number of the sync that it is.
    unfinished: HashMap<String, (Duration, String, usize)>,
    /// Where the next `write` goes, by file descriptor.
    positions: HashMap<String, u64>,
    syncs: usize,
}

impl Parser {
    /// `base` is the parent of the recorded root. Numbers syncs from `first_sync` on.
    fn new(base: &Path, first_sync: usize) -> Self {
        Self {
            base: base.display().to_string(),
            steps: Vec::new(),
            unfinished: HashMap::new(),
            positions: HashMap::new(),
            syncs: first_sync,
        }
    }

    fn line(&mut self, line: &str) {
        let (thread, rest) = line.split_once(' ').unwrap();
        let (time, call) = rest.trim_start().split_once(' ').unwrap();
        let time = Duration::from_secs_f64(time.parse().unwrap());
        if call.starts_with("---") || call.starts_with("+++") {
            return;
        }
        if let Some(begun) = call.strip_suffix(" <unfinished ...>") {
            let number = self.begin(begun, time);
            self.unfinished
                .insert(thread.to_owned(), (time, begun.to_owned(), number));
        } else if let Some(resumed) = call.strip_prefix("<... ") {
            let (began, begun, number) = self.unfinished.remove(thread).expect("the call has begun");
            let (_, rest) = resumed.split_once(" resumed>").unwrap();
            self.end(&format!("{begun}{rest}"), began, number);
        } else {
            let number = self.begin(call, time);
            self.end(call, time, number);
        }
    }

    /// A call begins. Returns its number if it is a sync.
    fn begin(&mut self, call: &str, began: Duration) -> usize {
        let Some(Change::EndSync { path, number }) = self.sync(call) else {
            return 0;
        };
        self.syncs = number;
        self.push(began, Change::BeginSync { path, number });
        number
    }

    fn sync(&self, call: &str) -> Option<Change> {
        let (name, args) = call.split_once('(').unwrap();
        let path = matches!(name, "fsync" | "fdatasync").then(|| self.path_of_descriptor(args))??;
        let number = self.syncs + 1;
        Some(Change::EndSync { path, number })
    }

    /// A call has returned.
    fn end(&mut self, call: &str, began: Duration, number: usize) {
        let (call, result) = call.rsplit_once(" = ").unwrap();
        let (name, args) = call.trim_end().split_once('(').unwrap();
        let args = split(args.strip_suffix(')').unwrap());
        if result.starts_with('-') || result.starts_with('?') {
            let is_sync = matches!(name, "fsync" | "fdatasync") && self.path_of_descriptor(args[0]).is_some();
            assert!(!is_sync, "{call}: {result}");
            return;
        }
        if let Some(change) = self.change(name, &args, result, number) {
            self.push(began, change);
        }
    }

    fn push(&mut self, began: Duration, change: Change) {
        self.steps.push(Step { began, change });
    }

    /// The change by a call that has succeeded; `None` if it changed nothing of the root.
    fn change(&mut self, name: &str, args: &[&str], result: &str, number: usize) -> Option<Change> {
        let number_at = |at: usize| args[at].parse::<u64>().unwrap();
        Some(match name {
            "openat" => return self.opened(args, result),
            "lseek" => {
                self.path_of_descriptor(args[0])?;
                self.positions
                    .insert(descriptor(args[0]).to_owned(), result.parse().unwrap());
                return None;
            }
            "write" => {
                let (path, bytes) = (self.path_of_descriptor(args[0])?, strings(args[1]).concat());
                let position = self
                    .positions
                    .get_mut(descriptor(args[0]))
                    .expect("the file was opened");
                let offset = *position;
                assert_eq!(result.parse(), Ok(bytes.len()), "partial write");
                *position += bytes.len() as u64;
                Change::Write {
                    path,
                    offset,
                    bytes: bytes.into(),
                }
            }
            "pwrite64" => {
                let (path, bytes) = (self.path_of_descriptor(args[0])?, strings(args[1]).concat());
                assert_eq!(result.parse(), Ok(bytes.len()), "partial write");
                Change::Write {
                    path,
                    offset: number_at(3),
                    bytes: bytes.into(),
                }
            }
            "ftruncate" => Change::Truncate {
                path: self.path_of_descriptor(args[0])?,
                len: number_at(1),
            },
            "fallocate" => {
                let path = self.path_of_descriptor(args[0])?;
                let (offset, len) = (number_at(2), number_at(3));
                match args[1] {
                    mode if mode.contains("PUNCH_HOLE") => Change::Punch { path, offset, len },
                    mode if mode.contains("KEEP_SIZE") => return None,
                    "0" => Change::Extend {
                        path,
                        len: offset + len,
                    },
                    mode => panic!("fallocate with {mode}"),
                }
            }
            "rename" => Change::Rename {
                from: self.relative(args[0])?,
                to: self.relative(args[1])?,
            },
            "renameat" | "renameat2" => {
                assert!(!args.iter().any(|arg| arg.contains("RENAME_EXCHANGE")));
                Change::Rename {
                    from: self.relative(args[1])?,
                    to: self.relative(args[3])?,
                }
            }
            "link" => Change::Link {
                from: self.relative(args[0])?,
                to: self.relative(args[1])?,
            },
            "linkat" => Change::Link {
                from: self.relative(args[1])?,
                to: self.relative(args[3])?,
            },
            "unlink" | "rmdir" => Change::Remove {
                path: self.relative(args[0])?,
            },
            "unlinkat" => Change::Remove {
                path: self.inside(args[0], args[1])?,
            },
            "mkdir" => Change::MakeDir {
                path: self.relative(args[0])?,
            },
            "mkdirat" => Change::MakeDir {
                path: self.inside(args[0], args[1])?,
            },
            "fsync" | "fdatasync" => Change::EndSync {
                path: self.path_of_descriptor(args[0])?,
                number,
            },
            // Not used on the root so far; a silent change would make the replay worthless.
            "mmap" if !args[2].contains("PROT_WRITE") || !args[3].contains("MAP_SHARED") => return None,
            other => {
                let touched = args
                    .iter()
                    .filter_map(|arg| self.relative(arg).or_else(|| self.path_of_descriptor(arg)));
                assert_eq!(touched.collect::<Vec<_>>(), [""; 0], "{other} is not recorded");
                return None;
            }
        })
    }

    fn opened(&mut self, args: &[&str], result: &str) -> Option<Change> {
        let path = self.path_of_descriptor(result)?;
        let flags = args[2];
        assert!(!flags.contains("O_APPEND"), "appends are not recorded");
        self.positions.insert(descriptor(result).to_owned(), 0);
        let (is_created, is_truncated) = (flags.contains("O_CREAT"), flags.contains("O_TRUNC"));
        (is_created || is_truncated).then_some(Change::Open { path, is_truncated })
    }

    /// The path in `NUMBER<PATH>`, if it is recorded.
    fn path_of_descriptor(&self, arg: &str) -> Option<String> {
        self.recorded(&path_of_descriptor(arg)?)
    }

    /// The path in a string argument, if it is recorded.
    fn relative(&self, arg: &str) -> Option<String> {
        let path = strings(arg).into_iter().next()?;
        self.recorded(&String::from_utf8(path).ok()?)
    }

    /// The path of a name in a directory, which may be absolute, if it is recorded.
    fn inside(&self, dir: &str, name: &str) -> Option<String> {
        let name = String::from_utf8(strings(name).into_iter().next()?).ok()?;
        match name.starts_with('/') {
            true => self.recorded(&name),
            false => self.recorded(&format!("{}/{name}", path_of_descriptor(dir)?)),
        }
    }

    /// The path relative to the base. What lies in `scratch` is removed at each start, unread.
    fn recorded(&self, path: &str) -> Option<String> {
        let path = path.strip_prefix(&self.base)?.trim_matches('/');
        let is_recorded = ["", "root"].contains(&path) || path.starts_with("root/");
        (is_recorded && !path.starts_with("root/scratch/")).then(|| path.to_owned())
    }
}

/// The path in `NUMBER<PATH>`; `None` if the file is deleted.
fn path_of_descriptor(arg: &str) -> Option<String> {
    let (_, rest) = arg.split_once('<')?;
    let (path, more) = rest.split_once('>')?;
    let path = String::from_utf8(unescape(path)).ok()?;
    (!more.starts_with("(deleted)")).then_some(path)
}

/// The number in `NUMBER<PATH>`.
fn descriptor(arg: &str) -> &str {
    arg.split('<').next().unwrap()
}

/// The arguments of a call: what is between commas outside of brackets. Strings are in hexadecimal.
fn split(args: &str) -> Vec<&str> {
    let (mut depth, mut start, mut parts) = (0, 0, Vec::new());
    for (at, letter) in args.char_indices() {
        match letter {
            '[' | '{' => depth += 1,
            ']' | '}' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(args[start..at].trim());
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(args[start..].trim());
    parts
}

/// The strings in an argument.
fn strings(arg: &str) -> Vec<Vec<u8>> {
    assert!(!arg.contains("\"..."), "strace cut a string");
    arg.split('"').skip(1).step_by(2).map(unescape).collect()
}

/// The bytes that `\x2f…` stands for.
fn unescape(text: &str) -> Vec<u8> {
    let digit = |digit: u8| char::from(digit).to_digit(16).expect("hexadecimal") as u8;
    let byte = |escaped: &[u8]| {
        assert_eq!(&escaped[..2], b"\\x", "{text}");
        digit(escaped[2]) << 4 | digit(escaped[3])
    };
    text.as_bytes().chunks(4).map(byte).collect()
}
