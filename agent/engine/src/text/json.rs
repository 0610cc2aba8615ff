//! JSON between requests and chat templates, written as Python's `json.dumps` writes it, because
//! that is what models saw in training.

use std::fmt::Write as _;

use minijinja::{
    Error, ErrorKind, Value,
    value::{Kwargs, ValueKind},
};

/// A JSON value as templates see it; objects keep the order that `value` has.
pub(super) fn to_template(value: &serde_json::Value) -> Value {
    match value {
        serde_json::Value::Null => Value::from(()),
        serde_json::Value::Bool(b) => Value::from(*b),
        serde_json::Value::Number(n) => match (n.as_i64(), n.as_u64(), n.as_f64()) {
            (Some(i), _, _) => Value::from(i),
            (None, Some(u), _) => Value::from(u),
            (None, None, float) => Value::from(float.unwrap_or(f64::NAN)),
        },
        serde_json::Value::String(s) => Value::from(s.as_str()),
        serde_json::Value::Array(items) => items.iter().map(to_template).collect(),
        serde_json::Value::Object(fields) => {
            Value::from_pairs(fields.iter().map(|(key, value)| (key.as_str(), to_template(value))))
        }
    }
}

/// The filter `tojson` as transformers defines it: nothing escaped for HTML, non-ASCII as it is,
/// and Python's parameters `ensure_ascii`, `indent`, `separators` and `sort_keys`.
pub(super) fn tojson(value: &Value, args: &Kwargs) -> Result<String, Error> {
    let indent: Option<Value> = args.get("indent")?;
    let separators: Option<Vec<String>> = args.get("separators")?;
    let indent = match indent.filter(|value| !value.is_none()) {
        Some(value) => Some(usize::try_from(value)?),
        None => None,
    };
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(invalid("`separators` must be a pair")),
        None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        None => (", ".to_owned(), ": ".to_owned()),
    };
    let mut writer = Writer {
        out: String::new(),
        indent,
        item,
        key,
        ascii: args.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sort: args.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    args.assert_all_used()?;
    writer.value(value, 0)?;
    Ok(writer.out)
}

/// Deepest nesting written; deeper input is an attack.
const DEPTH_MAX: usize = 128;

struct Writer {
    out: String,
    indent: Option<usize>,
    item: String,
    key: String,
    ascii: bool,
    sort: bool,
}

impl Writer {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > DEPTH_MAX {
            return Err(invalid("nested too deeply"));
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => {
                let text = if value.is_true() { "true" } else { "false" };
                self.out.push_str(text);
            }
            ValueKind::Number if value.is_integer() => {
                let _ = write!(self.out, "{value}");
            }
            ValueKind::Number => self.out.push_str(&float(f64::try_from(value.clone())?)),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.container(['[', ']'], &items, depth, |writer, item| {
                    writer.value(item, depth + 1)
                })?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort {
                    keys.sort();
                }
                self.container(['{', '}'], &keys, depth, |writer, key| {
                    writer.string(&key.to_string());
                    let separator = writer.key.clone();
                    writer.out.push_str(&separator);
                    writer.value(&value.get_item(key)?, depth + 1)
                })?;
            }
            kind => return Err(invalid(&format!("a value of type {kind} is not JSON"))),
        }
        Ok(())
    }

    fn container(
        &mut self,
        [open, close]: [char; 2],
        items: &[Value],
        depth: usize,
        mut write: impl FnMut(&mut Self, &Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.out.push(open);
        for (index, item) in items.iter().enumerate() {
            if index > 0 {
                let separator = self.item.clone();
                self.out.push_str(&separator);
            }
            self.line(depth + 1);
            write(self, item)?;
        }
        if !items.is_empty() {
            self.line(depth);
        }
        self.out.push(close);
        Ok(())
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = self.indent {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if u32::from(c) < 0x20 || (self.ascii && !c.is_ascii()) => {
                    let mut units = [0; 2];
                    for unit in c.encode_utf16(&mut units) {
                        let _ = write!(self.out, "\\u{unit:04x}");
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

/// Python's `repr` of a float: shortest digits that read back, an exponent below 1e-4 and from
/// 1e16 on.
fn float(value: f64) -> String {
    if value.is_nan() {
        return "NaN".to_owned();
    }
    if value.is_infinite() {
        return if value > 0.0 { "Infinity" } else { "-Infinity" }.to_owned();
    }
    let size = value.abs();
    if value == 0.0 || (1e-4..1e16).contains(&size) {
        return format!("{value:?}");
    }
    let text = format!("{value:e}");
    let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let (sign, exponent) = match exponent.strip_prefix('-') {
        Some(exponent) => ('-', exponent),
        None => ('+', exponent),
    };
    format!("{digits}e{sign}{exponent:0>2}")
}

fn invalid(detail: &str) -> Error {
    Error::new(ErrorKind::InvalidOperation, detail.to_owned())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn dumps(value: &serde_json::Value, args: &[(&str, Value)]) -> String {
        let args: Kwargs = args.iter().cloned().collect();
        tojson(&to_template(value), &args).unwrap()
    }

    #[test]
    fn as_python_writes_it() {
        let value =
            json!({"a": [1, 2.0, -3, null, true], "b": {}, "c": [], "d": "<é'\"\\\n\u{1}>"});
        assert_eq!(
            dumps(&value, &[]),
            r#"{"a": [1, 2.0, -3, null, true], "b": {}, "c": [], "d": "<é'\"\\\n\u0001>"}"#
        );
        assert_eq!(
            dumps(&json!({"a": [1, {"b": 2}]}), &[("indent", Value::from(2))]),
            "{\n  \"a\": [\n    1,\n    {\n      \"b\": 2\n    }\n  ]\n}"
        );
        let compact = Value::from(vec![",", ":"]);
        assert_eq!(dumps(&json!({"a": [1, 2]}), &[("separators", compact)]), r#"{"a":[1,2]}"#);
        let ascii = [("ensure_ascii", Value::from(true))];
        assert_eq!(dumps(&json!("é🦩"), &ascii), r#""\u00e9\ud83e\udda9""#);
    }

    #[test]
    fn floats_as_python_writes_them() {
        for (value, text) in [
            (0.1, "0.1"),
            (-0.0, "-0.0"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (-2.5e-7, "-2.5e-07"),
        ] {
            assert_eq!(float(value), text);
        }
    }

    #[test]
    fn large_integers_keep_their_digits() {
        assert_eq!(dumps(&json!(u64::MAX), &[]), u64::MAX.to_string());
        assert_eq!(dumps(&json!(i64::MIN), &[]), i64::MIN.to_string());
    }

    #[test]
    fn other_arguments_are_refused() {
        let args: Kwargs = [("indnt", Value::from(2))].into_iter().collect();
        assert!(tojson(&Value::from(1), &args).is_err());
    }
}
