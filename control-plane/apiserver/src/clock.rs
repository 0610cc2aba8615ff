//! The server's clock, and times as Kubernetes writes them.

use k8s_openapi::jiff::Timestamp;
use time::{
    OffsetDateTime, UtcOffset,
    format_description::well_known::{Rfc2822, Rfc3339},
};

/// Now, in whole seconds as `metav1.Time` has it.
pub(crate) fn now() -> OffsetDateTime {
    let now = OffsetDateTime::now_utc();
    now.replace_nanosecond(0).unwrap_or(now)
}

/// `2006-01-02T15:04:05Z`.
pub(crate) fn format(time: OffsetDateTime) -> String {
    time.format(&Rfc3339).expect("a year of the clock has four digits")
}

/// As headers of HTTP have it: `Mon, 02 Jan 2006 15:04:05 GMT`.
pub(crate) fn http_date(time: OffsetDateTime) -> String {
    let text = time.to_offset(UtcOffset::UTC).format(&Rfc2822);
    text.expect("a year of the clock has four digits").replace("+0000", "GMT")
}

/// `None` for a text that is not RFC 3339.
pub(crate) fn parse(text: &str) -> Option<OffsetDateTime> {
    OffsetDateTime::parse(text, &Rfc3339).ok()
}

/// Whether those who read it into a type can hold it: their clock ends before the year 10000.
pub(crate) fn is_time(text: &str) -> bool {
    parse(text).is_some() && text.parse::<Timestamp>().is_ok()
}

/// The time so long after the Unix epoch; microseconds are left out where they are 0. `None` for one
/// that can't be written.
pub(crate) fn from_unix(seconds: i64, micros: i64) -> Option<String> {
    let time = OffsetDateTime::from_unix_timestamp(seconds).ok()?;
    let text = time.format(&Rfc3339).ok()?;
    match micros {
        0 => Some(text),
        1..1_000_000 => Some(format!("{}.{micros:06}Z", text.trim_end_matches('Z'))),
        _ => None,
    }
}

/// An age as kubectl prints it: `45s`, `3m`, `5m12s`, `2d4h`.
pub(crate) fn age(from: OffsetDateTime, now: OffsetDateTime) -> String {
    let seconds = (now - from).whole_seconds();
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    let two = |big: i64, unit: &str, small: i64, small_unit: &str| {
        if small == 0 { format!("{big}{unit}") } else { format!("{big}{unit}{small}{small_unit}") }
    };
    match seconds {
        ..-1 => "<invalid>".to_owned(),
        -1 => "0s".to_owned(),
        0..120 => format!("{seconds}s"),
        120..600 => two(minutes, "m", seconds % 60, "s"),
        600..10_800 => format!("{minutes}m"),
        10_800..28_800 => two(hours, "h", minutes % 60, "m"),
        28_800..172_800 => format!("{hours}h"),
        172_800..691_200 => two(days, "d", hours % 24, "h"),
        691_200..63_072_000 => format!("{days}d"),
        63_072_000..252_288_000 => two(days / 365, "y", days % 365, "d"),
        _ => format!("{}y", days / 365),
    }
}

#[cfg(test)]
mod tests {
    use time::Duration;

    use super::*;

    #[test]
    fn ages_read_as_in_kubectl() {
        let now = parse("2026-11-22T12:00:00Z").unwrap();
        for (seconds, expect) in [
            (-5, "<invalid>"),
            (-1, "0s"),
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (312, "5m12s"),
            (600, "10m"),
            (10_799, "179m"),
            (10_800, "3h"),
            (11_000, "3h3m"),
            (28_800, "8h"),
            (172_800, "2d"),
            (190_000, "2d4h"),
            (864_000, "10d"),
            (63_072_000 + 86_400, "2y1d"),
            (315_360_000, "10y"),
        ] {
            assert_eq!(age(now - Duration::seconds(seconds), now), expect, "{seconds}");
        }
        assert_eq!(format(now), "2026-11-22T12:00:00Z");
        assert_eq!(parse("yesterday"), None);
        assert!(is_time("2026-11-22T12:00:00.000001+01:00"));
        for bad in ["", "noon", "2026-11-22", "9999-12-31T23:59:59Z", "2026-02-30T00:00:00Z"] {
            assert!(!is_time(bad), "{bad}");
        }
        assert_eq!(from_unix(0, 7).unwrap(), "1970-01-01T00:00:00.000007Z");
        assert_eq!(from_unix(i64::MAX, 0), None);
        assert_eq!(from_unix(0, -1), None);
    }
}
