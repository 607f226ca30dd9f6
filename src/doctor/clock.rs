//! Checks the system clock. With a wrong clock, no registry's certificate is valid.

use std::{
    fs,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use super::Finding;

const NAME: &str = "clock";
const ADVICE: &str = "set the clock and synchronize it (`timedatectl set-ntp true`, chrony, or the host's clock in a \
                      virtual machine): with a wrong clock, no registry's certificate is valid";
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Compares the clock with the program's build time, and asks the kernel whether it is synchronized.
pub fn check() -> Finding {
    // The current time cannot precede the build time.
    let built = fs::metadata("/proc/self/exe").and_then(|metadata| metadata.modified());
    judge(SystemTime::now(), built.unwrap_or(UNIX_EPOCH), is_synchronized())
}

fn judge(now: SystemTime, built: SystemTime, synchronized: Option<bool>) -> Finding {
    let year = 1970 + now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs() / 31_556_952;
    if now + DAY < built {
        return Finding::fail(
            NAME,
            format!("the clock shows the year {year}, before this program was built"),
            ADVICE,
        );
    }
    if year >= 2100 {
        return Finding::fail(NAME, format!("the clock shows the year {year}"), ADVICE);
    }
    match synchronized {
        Some(false) => Finding::warn(NAME, "plausible, but not synchronized", ADVICE),
        Some(true) => Finding::ok(NAME, "synchronized"),
        None => Finding::ok(NAME, "plausible"),
    }
}

/// Whether the kernel considers the clock synchronized (adjtimex(2), `STA_UNSYNC`); `None` if the call fails.
#[expect(unsafe_code, reason = "no crate in use has adjtimex(2)")]
fn is_synchronized() -> Option<bool> {
    // SAFETY: all fields are integers, for which zero is valid.
    let mut state: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: `state` is valid for the call. With no mode set, the call only reads the clock's state.
    let read = unsafe { libc::adjtimex(&raw mut state) };
    (read >= 0).then_some(state.status & libc::STA_UNSYNC == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;

    #[test]
    fn implausible_clock_fails() {
        let at = |days: u32| UNIX_EPOCH + DAY * days;
        for (now, built, synchronized, expected) in [
            (at(20_000), at(19_999), Some(true), Status::Ok),
            (at(20_000), at(19_999), None, Status::Ok),
            (at(20_000), at(19_999), Some(false), Status::Warn),
            (at(20_000), at(20_001), Some(true), Status::Ok),
            (at(10), at(20_000), Some(true), Status::Fail),
            (at(50_000), at(20_000), Some(true), Status::Fail),
        ] {
            assert_eq!(judge(now, built, synchronized).status, expected, "{now:?}");
        }
        assert!(judge(at(10), at(20_000), None).detail.contains("1970"));
    }
}
