//! Formats sizes, times and rates for people.

use std::time::Duration;

/// Formats a number of bytes with a binary unit: `1.50 KiB`.
pub fn size(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}

/// Formats a time with three digits: `4.56 ms`.
pub fn time(time: Duration) -> String {
    let nanoseconds = time.as_nanos() as f64;
    let units = [(1e9, "s"), (1e6, "ms"), (1e3, "µs")];
    if nanoseconds < 1000.0 {
        return format!("{nanoseconds:.0} ns");
    }
    // Values that round to 1000 of a unit use the next unit.
    let unit = units.into_iter().find(|(unit, _)| nanoseconds >= unit * 0.9995);
    let (unit, name) = unit.unwrap_or((1e3, "µs"));
    format!("{} {name}", digits(nanoseconds / unit))
}

/// Formats a number with at least three digits: `0.123`, `4.56`, `78.9`, `1,234`.
pub fn digits(number: f64) -> String {
    match number {
        number if number >= 99.95 || number == 0.0 => thousands(number.round() as u64),
        number if number >= 9.995 => format!("{number:.1}"),
        number if number >= 0.9995 => format!("{number:.2}"),
        number => format!("{number:.3}"),
    }
}

/// Formats an integer with thousands separators.
pub fn thousands(number: u64) -> String {
    indicatif::HumanCount(number).to_string()
}

/// Formats a rate in bytes per second as MB/s, without the unit.
pub fn megabytes(per_second: f64) -> String {
    digits(per_second / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_formatted_with_three_digits() {
        for (nanoseconds, text) in [
            (0, "0 ns"),
            (7, "7 ns"),
            (999, "999 ns"),
            (1000, "1.00 µs"),
            (999_900, "1.00 ms"),
            (45_678_000, "45.7 ms"),
            (123_456_000_000, "123 s"),
        ] {
            assert_eq!(time(Duration::from_nanos(nanoseconds)), text);
        }
        for (number, text) in [
            (0.0, "0"),
            (0.1234, "0.123"),
            (12.34, "12.3"),
            (99.99, "100"),
            (12_345.6, "12,346"),
        ] {
            assert_eq!(digits(number), text);
        }
        assert_eq!((size(1536).as_str(), megabytes(154.3e6).as_str()), ("1.50 KiB", "154"));
    }
}
