//! Byte quantities in the Kubernetes notation (`19Gi`, `512Mi`, `1500M`, `4096`).

use std::{borrow::Cow, fmt, str::FromStr};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A number of bytes. Written with the binary suffix that keeps the number short: exact when
/// parsed from text that is exact, rounded to a whole unit by [`Quantity::rounded`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Quantity {
    bytes: u64,
}

/// Text that is not a byte quantity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a byte quantity such as 512Mi, 19Gi or 4096")]
pub struct ParseQuantityError(String);

const UNITS: [(&str, u64); 10] = [
    ("Ki", 1 << 10),
    ("Mi", 1 << 20),
    ("Gi", 1 << 30),
    ("Ti", 1 << 40),
    ("Pi", 1 << 50),
    ("k", 1_000),
    ("M", 1_000_000),
    ("G", 1_000_000_000),
    ("T", 1_000_000_000_000),
    ("", 1),
];

impl Quantity {
    /// Exactly this many bytes.
    pub const fn from_bytes(bytes: u64) -> Self {
        Self { bytes }
    }

    /// The number of bytes.
    pub const fn bytes(self) -> u64 {
        self.bytes
    }

    /// Rounded to the nearest whole binary unit that leaves at least 1 unit, for tables.
    pub fn rounded(self) -> Self {
        let unit = binary_unit(self.bytes).1;
        Self { bytes: (self.bytes + unit / 2) / unit * unit }
    }
}

fn binary_unit(bytes: u64) -> (&'static str, u64) {
    let fits = |unit: &&(&'static str, u64)| bytes >= unit.1;
    UNITS[..5].iter().rev().find(fits).copied().unwrap_or(("", 1))
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let exact = |unit: &&(&str, u64)| self.bytes > 0 && self.bytes.is_multiple_of(unit.1);
        let (suffix, unit) = UNITS[..5].iter().rev().find(exact).copied().unwrap_or(("", 1));
        write!(f, "{}{suffix}", self.bytes / unit)
    }
}

impl FromStr for Quantity {
    type Err = ParseQuantityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseQuantityError(text.to_owned());
        let (number, unit) = UNITS
            .iter()
            .find_map(|(suffix, unit)| text.strip_suffix(suffix).map(|n| (n, *unit)))
            .ok_or_else(error)?;
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        let digits = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
        if whole.is_empty() || !digits(whole) || !digits(fraction) || fraction.len() > 9 {
            return Err(error());
        }
        let whole: u64 = whole.parse().map_err(|_| error())?;
        let mut bytes = whole.checked_mul(unit).ok_or_else(error)?;
        if !fraction.is_empty() {
            let scale = 10u128.pow(fraction.len() as u32);
            let part: u128 = fraction.parse().map_err(|_| error())?;
            let part = (part * u128::from(unit)).div_ceil(scale);
            bytes =
                u64::try_from(part).ok().and_then(|p| bytes.checked_add(p)).ok_or_else(error)?;
        }
        Ok(Self { bytes })
    }
}

impl Serialize for Quantity {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Quantity {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<'_, str>::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}

impl JsonSchema for Quantity {
    fn schema_name() -> Cow<'static, str> {
        "Quantity".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        // As many digits as fit 64 bits with each unit: what the schema lets pass can be read.
        let units =
            [(19, ""), (16, "(Ki|k)"), (13, "(Mi|M)"), (10, "(Gi|G)"), (7, "(Ti|T)"), (4, "Pi")];
        let units =
            units.map(|(digits, unit)| format!("[0-9]{{1,{digits}}}(\\.[0-9]{{1,9}})?{unit}"));
        json_schema!({
            "type": "string",
            "pattern": format!("^({})$", units.join("|")),
            "maxLength": 32,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(text: &str, bytes: u64, printed: &str) {
        let quantity: Quantity = text.parse().unwrap();
        assert_eq!(quantity.bytes(), bytes, "{text}");
        assert_eq!(quantity.to_string(), printed, "{text}");
    }

    #[test]
    fn reads_and_prints_kubernetes_notation() {
        check("0", 0, "0");
        check("4096", 4096, "4Ki");
        check("19Gi", 19 << 30, "19Gi");
        check("1.5Gi", 3 << 29, "1536Mi");
        check("1500M", 1_500_000_000, "1500000000");
        for bad in ["", "Gi", "-1Gi", "1 Gi", "1.Gi.", "99999999999Pi", "1e3", "0.1234567891Gi"] {
            assert!(bad.parse::<Quantity>().is_err(), "{bad}");
        }
    }

    #[test]
    fn rounds_to_a_whole_unit() {
        let rounded = |bytes| Quantity::from_bytes(bytes).rounded().to_string();
        assert_eq!(rounded((19 << 30) + 12_345), "19Gi");
        assert_eq!(rounded(1_600_000), "2Mi");
        assert_eq!(rounded(900), "900");
    }

    fn pattern() -> String {
        let schema = Quantity::json_schema(&mut SchemaGenerator::default());
        schema.get("pattern").unwrap().as_str().unwrap().to_owned()
    }

    #[test]
    fn the_largest_texts_of_the_schema_are_read() {
        assert!(
            pattern().starts_with(r"^([0-9]{1,19}(\.[0-9]{1,9})?|[0-9]{1,16}("),
            "{}",
            pattern()
        );
        for (digits, units) in [
            (19, &[""][..]),
            (16, &["Ki", "k"]),
            (13, &["Mi", "M"]),
            (10, &["Gi", "G"]),
            (7, &["Ti", "T"]),
            (4, &["Pi"]),
        ] {
            for unit in units {
                let text = format!("{}.999999999{unit}", "9".repeat(digits));
                assert!(text.parse::<Quantity>().is_ok(), "{text}");
            }
        }
    }

    proptest! {
        #[test]
        fn printing_loses_nothing(bytes: u64) {
            let quantity = Quantity::from_bytes(bytes);
            prop_assert_eq!(quantity.to_string().parse::<Quantity>().unwrap(), quantity);
        }
    }
}
