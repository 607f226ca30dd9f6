//! The clock: with a wrong one, certificates seem to have expired, or not to be valid yet.

use std::{
    fs,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use super::Finding;

const NAME: &str = "clock";
const ADVICE: &str = "set the clock, and let it be kept right (`timedatectl set-ntp true`, chrony, or the host's clock in a \
                      virtual machine): with a wrong one no registry's certificate is valid";
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// What the clock shows, beside what is known without it.
pub fn look() -> Finding {
    // It cannot be earlier than this program was made.
    let made = fs::metadata("/proc/self/exe").and_then(|metadata| metadata.modified());
    judge(SystemTime::now(), made.unwrap_or(UNIX_EPOCH), is_synchronised())
}

fn judge(now: SystemTime, made: SystemTime, synchronised: Option<bool>) -> Finding {
    let year = 1970 + now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs() / 31_556_952;
    if now + DAY < made {
        return Finding::fail(
            NAME,
            format!("it shows a day in {year}, before this program was made"),
            ADVICE,
        );
    }
    if year >= 2100 {
        return Finding::fail(NAME, format!("it shows the year {year}"), ADVICE);
    }
    match synchronised {
        Some(false) => Finding::warn(NAME, "it looks right, but nothing keeps it so", ADVICE),
        Some(true) => Finding::ok(NAME, "it is kept right"),
        None => Finding::ok(NAME, "it looks right"),
    }
}

/// Whether the kernel believes that something keeps the clock right; nothing if it does not tell.
fn is_synchronised() -> Option<bool> {
    // SAFETY: all fields are numbers, for which zero is a value.
    let mut state: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: `state` is valid for the call, which only reads the clock's state, as no mode is set.
    let read = unsafe { libc::adjtimex(&raw mut state) };
    (read >= 0).then_some(state.status & libc::STA_UNSYNC == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;

    #[test]
    fn wrong_clocks() {
        let at = |days: u32| UNIX_EPOCH + DAY * days;
        for (now, made, synchronised, expected) in [
            (at(20_000), at(19_999), Some(true), Status::Ok),
            (at(20_000), at(19_999), None, Status::Ok),
            (at(20_000), at(19_999), Some(false), Status::Warn),
            (at(20_000), at(20_001), Some(true), Status::Ok),
            (at(10), at(20_000), Some(true), Status::Fail),
            (at(50_000), at(20_000), Some(true), Status::Fail),
        ] {
            assert_eq!(judge(now, made, synchronised).status, expected, "{now:?}");
        }
        assert!(judge(at(10), at(20_000), None).detail.contains("1970"));
    }
}
