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

    /// The time by a format of C's `strftime`, in UTC.
    pub(super) fn format(self, format: &str) -> Result<String, String> {
        jiff::fmt::strtime::format(format, &self.0.to_zoned_datetime(TimeZone::UTC)).map_err(|e| e.to_string())
    }
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
        assert_eq!("2025-07-01".parse::<Clock>().unwrap().to_string(), "2025-07-01T00:00:00Z");
        assert!("tomorrow".parse::<Clock>().is_err());
    }
}
