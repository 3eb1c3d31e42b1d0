//! Numbers as text.

use std::time::Duration;
use swat::report::format::*;

#[test]
fn units() {
    assert_eq!(bytes(0), "0 B");
    assert_eq!(bytes(1023), "1023 B");
    assert_eq!(bytes(1024), "1.00 KiB");
    assert_eq!(bytes(3 << 29), "1.50 GiB");
    assert_eq!(bytes(u64::MAX), "16.0 EiB");
    assert_eq!(count(0), "0");
    assert_eq!(count(999), "999");
    assert_eq!(count(1_234_567), "1,234,567");
    assert_eq!(compact(999), "999");
    assert_eq!(compact(1_234_567), "1.23 M");
    assert_eq!(compact(999_999), "1.00 M");
}

#[test]
fn digits() {
    assert_eq!(percent(0.3125, 1), "31.2 %");
    assert_eq!(percent(f64::NAN, 1), MISSING);
    assert_eq!(fixed(-0.0004, 2), "0.00");
    assert_eq!(fixed(-0.4, 1), "-0.4");
    assert_eq!(significant(0.012345, 3), "0.0123");
    assert_eq!(significant(9.996, 3), "10.0");
    assert_eq!(significant(123456.0, 3), "123456");
    assert_eq!(significant(1.234e-7, 3), "1.23e-7");
    assert_eq!(significant(-2.5e9, 2), "-2.5e9");
    assert_eq!(plus_minus(0.41234, 0.0131), "0.412 ± 0.013");
    assert_eq!(plus_minus(1234.5, 250.0), "1234 ± 250");
    assert_eq!(plus_minus(0.5, f64::NAN), "0.500");
}

#[test]
fn durations() {
    assert_eq!(duration(Duration::from_nanos(17)), "17 ns");
    assert_eq!(duration(Duration::from_nanos(45_000)), "45.0 µs");
    assert_eq!(duration(Duration::from_millis(3210)), "3.21 s");
    assert_eq!(duration(Duration::from_millis(59_960)), "1 min 00 s");
    assert_eq!(duration(Duration::from_secs(245)), "4 min 05 s");
    assert_eq!(duration(Duration::from_secs(3720)), "1 h 02 min");
}
