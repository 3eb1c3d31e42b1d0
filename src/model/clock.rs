//! The time that `strftime_now` of a chat template gives.

use crate::error::{Error, Result};
use jiff::Timestamp;
use jiff::civil::{Date, DateTime};
use jiff::tz::TimeZone;
use std::fmt;
use std::str::FromStr;

/// Variable that fixes the time of a build, in seconds since 1970 (reproducible-builds.org).
const VARIABLE: &str = "SOURCE_DATE_EPOCH";

/// A point in time, in whole seconds. Written `2025-07-01T12:30:00Z`; a date alone, a time without a zone (UTC) and
/// seconds since 1970 are read as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clock(Timestamp);

impl Clock {
    /// The time that the environment variable `SOURCE_DATE_EPOCH` fixes, else now.
    ///
    /// # Errors
    /// [`Error::Input`] where the variable holds no number of seconds.
    pub fn now() -> Result<Self> {
        match std::env::var(VARIABLE).ok().filter(|text| !text.is_empty()) {
            Some(text) => {
                text.parse().map_err(|expected: String| Error::input(VARIABLE, format!("`{text}`"), expected))
            }
            None => Timestamp::from_second(Timestamp::now().as_second())
                .map(Self)
                .map_err(|e| Error::failed(format!("the clock: {e}"), "set the time of this machine")),
        }
    }

    /// The time in UTC by a format of `strftime`, as Python's `datetime` writes it on Linux.
    pub(super) fn format(self, format: &str) -> Result<String, String> {
        jiff::fmt::strtime::format(as_python(format), &self.0.to_zoned_datetime(TimeZone::UTC))
            .map_err(|e| e.to_string())
    }
}

/// A format with directives of which jiff makes something else than Python replaced by what they stand for there. A time
/// without a zone has no name of it; what is no directive is text.
fn as_python(format: &str) -> String {
    let mut python = String::with_capacity(format.len());
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            python.push(c);
            continue;
        }
        let directive = chars.clone().take_while(|c| "-_^#".contains(*c) || c.is_ascii_digit()).count();
        let text: String = chars.by_ref().take(directive + 1).collect();
        match text.chars().last() {
            Some('c') => python.push_str("%a %b %e %H:%M:%S %Y"),
            Some('x') => python.push_str("%m/%d/%y"),
            Some('f') => python.push_str("000000"),
            Some('z' | 'Z') => {}
            Some(known) if "aAbBCdDeFgGhHIjklmMnpPrRsStTuUVwWXyY%".contains(known) => python.extend(["%", &text]),
            Some(_) => python.extend(["%%", &text]),
            None => python.push('%'),
        }
    }
    python
}

impl FromStr for Clock {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let utc = |time: DateTime| time.to_zoned_datetime(TimeZone::UTC).ok().map(|zoned| zoned.timestamp());
        let seconds = text.parse().ok().and_then(|seconds| Timestamp::from_second(seconds).ok());
        let found = seconds.or_else(|| text.parse::<Timestamp>().ok());
        let found = found.or_else(|| text.parse::<DateTime>().ok().and_then(utc));
        let found = found.or_else(|| text.parse::<Date>().ok().and_then(|date| utc(date.at(0, 0, 0, 0))));
        let found = found.and_then(|time| Timestamp::from_second(time.as_second()).ok());
        found.map(Self).ok_or_else(|| {
            "a date such as 2025-07-01, a time such as 2025-07-01T12:30:00Z, or seconds since 1970".into()
        })
    }
}

impl fmt::Display for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

crate::options::serde_as_text!(Clock);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_in_every_form() {
        for text in ["1751373000", "2025-07-01T12:30:00Z", "2025-07-01T12:30:00", "2025-07-01T14:30:00+02:00"] {
            let clock: Clock = text.parse().unwrap();
            assert_eq!(clock.to_string(), "2025-07-01T12:30:00Z", "{text}");
            // As Python's time.strftime gives it for this time in UTC.
            assert_eq!(clock.format("%d %B %Y, %H:%M").unwrap(), "01 July 2025, 12:30");
        }
        // As Python 3.11 writes datetime(2025, 7, 1, 12, 30, 5) on Linux.
        let clock: Clock = "2025-07-01T12:30:05".parse().unwrap();
        for (format, expected) in [
            ("%c", "Tue Jul  1 12:30:05 2025"),
            ("%x %X", "07/01/25 12:30:05"),
            ("%D %F %T %R", "07/01/25 2025-07-01 12:30:05 12:30"),
            ("%r", "12:30:05 PM"),
            ("%f|%z|%Z|%#Z", "000000|||"),
            ("%-d %_d %03d %^a", "1  1 001 TUE"),
            ("%j %U %V %W %u %w %C %g %G %y", "182 26 27 26 2 2 20 25 2025 25"),
            ("%e %k %l %P %h %s", " 1 12 12 pm Jul 1751373005"),
            ("%q %Q %v %E %:z %i", "%q %Q %v %E %:z %i"),
            ("100%% é", "100% é"),
        ] {
            assert_eq!(clock.format(format).as_deref(), Ok(expected), "{format}");
        }
        assert!(clock.format("30 %").is_err(), "a directive that is not there");
        assert_eq!("2025-07-01".parse::<Clock>().unwrap().to_string(), "2025-07-01T00:00:00Z");
        assert!("tomorrow".parse::<Clock>().is_err());
    }
}
