//! Typed access to the fields of a JSON object, with errors that name the field.
//!
//! `null` counts as absent, as OpenAI treats it; fields that nobody asks for are ignored.

use serde_json::{Map, Value};

use crate::error::ApiError;

/// An object of the request, and the path that leads to it (empty for the request itself).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fields<'a> {
    object: &'a Map<String, Value>,
    path: &'a str,
}

impl<'a> Fields<'a> {
    pub(crate) fn new(object: &'a Map<String, Value>, path: &'a str) -> Self {
        Self { object, path }
    }

    /// The field's full path.
    pub(crate) fn path(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    pub(crate) fn get(&self, name: &str) -> Option<&'a Value> {
        self.object.get(name).filter(|value| !value.is_null())
    }

    pub(crate) fn required(&self, name: &str) -> Result<&'a Value, ApiError> {
        self.get(name).ok_or_else(|| self.error(name, "is required"))
    }

    pub(crate) fn str(&self, name: &str) -> Result<Option<&'a str>, ApiError> {
        self.typed(name, "a string", Value::as_str)
    }

    pub(crate) fn required_str(&self, name: &str) -> Result<&'a str, ApiError> {
        self.required(name)?;
        self.str(name)?
            .filter(|text| !text.is_empty())
            .ok_or_else(|| self.error(name, "must not be empty"))
    }

    pub(crate) fn bool(&self, name: &str) -> Result<Option<bool>, ApiError> {
        self.typed(name, "true or false", Value::as_bool)
    }

    pub(crate) fn array(&self, name: &str) -> Result<Option<&'a [Value]>, ApiError> {
        self.typed(name, "an array", |value| value.as_array().map(Vec::as_slice))
    }

    pub(crate) fn object(&self, name: &str) -> Result<Option<&'a Map<String, Value>>, ApiError> {
        self.typed(name, "an object", Value::as_object)
    }

    /// A whole number within `range`.
    pub(crate) fn integer(
        &self,
        name: &str,
        range: std::ops::RangeInclusive<i64>,
    ) -> Result<Option<i64>, ApiError> {
        match self.typed(name, "a whole number", whole)?.map(i64::try_from) {
            None => Ok(None),
            Some(Ok(number)) if range.contains(&number) => Ok(Some(number)),
            Some(_) => {
                let (low, high) = range.into_inner();
                Err(self.error(name, &format!("must be between {low} and {high}")))
            }
        }
    }

    /// A number within `low..=high`.
    pub(crate) fn number(&self, name: &str, low: f64, high: f64) -> Result<Option<f64>, ApiError> {
        match self.typed(name, "a number", Value::as_f64)? {
            Some(n) if !(low..=high).contains(&n) => {
                Err(self.error(name, &format!("must be between {low} and {high}")))
            }
            number => Ok(number),
        }
    }

    /// 400: "`path` problem".
    pub(crate) fn error(&self, name: &str, problem: &str) -> ApiError {
        let path = self.path(name);
        let message = format!("`{path}` {problem}");
        ApiError::invalid(path, message)
    }

    fn typed<T>(
        &self,
        name: &str,
        wanted: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ApiError> {
        self.get(name)
            .map(|value| {
                read(value).ok_or_else(|| {
                    self.error(name, &format!("must be {wanted}, not {}", kind_of(value)))
                })
            })
            .transpose()
    }
}

/// A number without a fraction, however it is written and however large it is.
fn whole(value: &Value) -> Option<i128> {
    let exact = value.as_i64().map(i128::from).or_else(|| value.as_u64().map(i128::from));
    // What 64 bits don't hold was read as a float; the cast ends at the type's limits.
    exact.or_else(|| value.as_f64().filter(|n| n.fract() == 0.0).map(|n| n as i128))
}

/// What a value is, in the words of an error message.
pub(crate) fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(n) if n.is_f64() => "a fraction",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}
