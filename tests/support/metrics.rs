//! Whether metrics are in the form that Prometheus reads, and named as it advises.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::Write as _,
    process::{Command, Stdio},
};

/// Type of each family, by its name.
pub type Types = BTreeMap<String, String>;

/// Looks at what `promtool check metrics` looks at, and more: each family has help and a type before
/// its samples and stands in one place, names end as their types and units want it, no series comes
/// twice, buckets count up to what their histogram counts. Where promtool is installed it looks, too.
///
/// # Panics
/// When something is wrong.
pub fn check(text: &str) -> Types {
    let mut seen = Seen::default();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').unwrap_or_else(|| panic!("{line}"));
            assert!(!help.is_empty() && seen.helped.insert(name.to_owned()), "{line}");
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap_or_else(|| panic!("{line}"));
            assert!(seen.helped.contains(name), "{line}");
            check_name(name, kind);
            seen.types.insert(name.to_owned(), kind.to_owned());
        } else {
            seen.sample(line);
        }
    }
    assert_eq!(seen.infinite, seen.counts, "the last buckets, and what histograms count");
    check_by_promtool(text);
    seen.types
}

/// Units that are not the base unit, and what counts for itself.
const BAD_PARTS: [&str; 11] = [
    "ms",
    "us",
    "ns",
    "milliseconds",
    "minutes",
    "hours",
    "kb",
    "mb",
    "mib",
    "kilobytes",
    "percent",
];

fn check_name(name: &str, kind: &str) {
    assert_eq!(kind == "counter", name.ends_with("_total"), "{name} is a {kind}");
    for part in name.split('_') {
        assert!(!BAD_PARTS.contains(&part), "{name}: not in base units");
    }
    for ending in ["_count", "_sum", "_bucket"] {
        assert!(!name.ends_with(ending), "{name} looks like a part of a histogram");
    }
}

#[derive(Default)]
struct Seen {
    helped: BTreeSet<String>,
    types: Types,
    series: BTreeSet<String>,
    /// Families of which all samples should have come.
    closed: BTreeSet<String>,
    current: String,
    /// The histogram that is being read, with its labels, and its last count.
    bucket: (String, f64),
    /// Of each histogram with its labels, the bucket without a bound.
    infinite: BTreeMap<String, f64>,
    /// The same by what it counts.
    counts: BTreeMap<String, f64>,
}

impl Seen {
    fn sample(&mut self, line: &str) {
        let (series, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("{line}"));
        let name = series.split_once('{').map_or(series, |(name, _)| name);
        let is_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        let begins_well = name.starts_with(|c: char| c.is_ascii_lowercase());
        assert!(name.chars().all(is_name) && begins_well, "{line}");
        let value: f64 = value.parse().unwrap_or_else(|_| panic!("{line}"));
        let base = self.family(name).to_owned();
        assert!(self.types.contains_key(&base), "no type before {line}");
        if base != self.current {
            assert!(self.closed.insert(base.clone()), "{base} stands in two places");
            self.current.clone_from(&base);
        }
        assert!(self.series.insert(series.to_owned()), "twice: {line}");
        if name.ends_with("_bucket") {
            let (group, _) = series.split_once("le=").unwrap_or_else(|| panic!("{line}"));
            if self.bucket.0 != group {
                self.bucket = (group.to_owned(), 0.0);
            }
            assert!(value >= self.bucket.1, "{line}");
            self.bucket.1 = value;
            if let Some((group, _)) = series.split_once("le=\"+Inf\"") {
                let labels = group.trim_start_matches(name).trim_matches(['{', ',']);
                self.infinite.insert(format!("{base} {labels}"), value);
            }
        } else if base != name && name.ends_with("_count") {
            let labels = series.trim_start_matches(name).trim_matches(['{', '}']);
            self.counts.insert(format!("{base} {labels}"), value);
        }
    }

    /// The name of the family that a sample belongs to.
    fn family<'a>(&self, name: &'a str) -> &'a str {
        let bases = ["_bucket", "_sum", "_count"].iter().filter_map(|p| name.strip_suffix(p));
        let mut bases =
            bases.filter(|base| self.types.get(*base).is_some_and(|t| t == "histogram"));
        bases.next().unwrap_or(name)
    }
}

/// Prometheus' own check, where it is installed.
fn check_by_promtool(text: &str) {
    let mut promtool = Command::new("promtool");
    promtool.args(["check", "metrics"]).stdin(Stdio::piped());
    let Ok(mut running) = promtool.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn() else {
        return;
    };
    let mut pipe = running.stdin.take().unwrap();
    pipe.write_all(text.as_bytes()).unwrap();
    drop(pipe);
    let output = running.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.is_empty(), "promtool: {said}");
}
