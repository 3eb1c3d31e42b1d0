//! Numbers as text: bytes, counts, shares, significant digits, uncertainties, durations.

use std::time::Duration;

/// Shown for a value that is missing or not finite.
pub const MISSING: &str = "–";

/// Bytes with a binary unit and three significant digits: `1.50 GiB`, `512 B`.
pub fn bytes(bytes: u64) -> String {
    let (value, unit) = scaled(bytes as f64, 1024.0, &["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"]);
    if unit == "B" { format!("{bytes} B") } else { format!("{} {unit}", three_digits(value)) }
}

/// A count with thousands separated by commas: `1,234,567`.
pub fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A count with a decimal unit and three significant digits: `1.23 M`, `940`.
pub fn compact(n: u64) -> String {
    let (value, unit) = scaled(n as f64, 1000.0, &["", "k", "M", "G", "T", "P", "E"]);
    if unit.is_empty() { n.to_string() } else { format!("{} {unit}", three_digits(value)) }
}

/// A fraction in percent: `percent(0.3125, 1)` is `31.2 %`.
pub fn percent(share: f64, decimals: usize) -> String {
    if share.is_finite() { format!("{} %", fixed(share * 100.0, decimals)) } else { MISSING.into() }
}

/// A number with a fixed number of decimals and no negative zero; [`MISSING`] if it is not finite.
pub fn fixed(value: f64, decimals: usize) -> String {
    if !value.is_finite() {
        return MISSING.into();
    }
    let text = format!("{value:.decimals$}");
    let zero = text.bytes().all(|b| matches!(b, b'-' | b'0' | b'.'));
    if zero { text.trim_start_matches('-').to_owned() } else { text }
}

/// A number with `digits` significant digits, in scientific notation outside 1e-4 … 1e6: `0.0123`, `1.23e-7`.
pub fn significant(value: f64, digits: usize) -> String {
    let digits = digits.clamp(1, 17);
    if !value.is_finite() {
        return MISSING.into();
    }
    if value == 0.0 {
        return "0".into();
    }
    // The exponent after rounding: 9.996 with three digits is 10.0, not 10.00.
    let rounded = format!("{value:.*e}", digits - 1);
    let exponent: i32 = rounded.split_once('e').and_then(|(_, e)| e.parse().ok()).unwrap_or(0);
    if !(-4..6).contains(&exponent) {
        return rounded;
    }
    fixed(value, (digits as i32 - 1 - exponent).max(0) as usize)
}

/// A mean and its uncertainty, rounded to two significant digits of the uncertainty: `0.412 ± 0.013`.
pub fn plus_minus(mean: f64, error: f64) -> String {
    if !mean.is_finite() || !error.is_finite() || error <= 0.0 {
        return significant(mean, 3);
    }
    let decimals = (1.0 - error.log10().floor()).clamp(0.0, 9.0) as usize;
    format!("{} ± {}", fixed(mean, decimals), fixed(error, decimals))
}

/// A duration with three significant digits or to the second: `45.0 µs`, `12.3 ms`, `3.21 s`, `4 min 05 s`, `1 h 02
/// min`.
pub fn duration(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    if seconds < 59.95 {
        let nanos = time.as_nanos() as f64;
        let (value, unit) = scaled(nanos, 1000.0, &["ns", "µs", "ms", "s"]);
        return if unit == "ns" { format!("{nanos} ns") } else { format!("{} {unit}", three_digits(value)) };
    }
    let whole = seconds.round() as u64;
    if whole < 3600 {
        format!("{} min {:02} s", whole / 60, whole % 60)
    } else {
        let minutes = (whole + 30) / 60;
        format!("{} h {:02} min", count(minutes / 60), minutes % 60)
    }
}

/// Divides by `step` while there is a larger unit and the value has more than three digits.
fn scaled<'a>(mut value: f64, step: f64, units: &[&'a str]) -> (f64, &'a str) {
    let mut units = units.iter().copied();
    let mut unit = units.next().unwrap_or("");
    for larger in units {
        if value < step - 0.5 {
            break;
        }
        value /= step;
        unit = larger;
    }
    (value, unit)
}

/// Three significant digits of a value from 1 to 1023.
fn three_digits(value: f64) -> String {
    let decimals = if value < 9.995 {
        2
    } else if value < 99.95 {
        1
    } else {
        0
    };
    format!("{value:.decimals$}")
}
