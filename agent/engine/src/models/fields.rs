//! Typed reading of `config.json`, with errors that name the field. Knows no architecture.

use serde_json::Value;

use crate::config::ConfigError;

/// Sizes of all models are far below; products of two, in bytes, stay far below what 64 bits hold.
const SIZE_MAX: i32 = 1 << 24;
/// Of layers, and of experts in each: all are listed before the weights are looked at. The largest models have an
/// eighth of the first and half of the second.
const PARTS_MAX: i32 = 1024;

/// A configuration object. A field that is null counts as absent.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a>(pub(super) &'a Value);

pub(super) fn bad(field: &'static str, reason: impl Into<String>) -> ConfigError {
    ConfigError::Value { field, reason: reason.into() }
}

/// `count` layers or experts, if they are not absurdly many.
pub(super) fn parts(field: &'static str, count: i32) -> Result<i32, ConfigError> {
    let reason = || format!("{count} is more than {PARTS_MAX}");
    (count <= PARTS_MAX).then_some(count).ok_or_else(|| bad(field, reason()))
}

/// Rows or columns of a matrix that several sizes make together; `field` is one of them.
pub(super) fn product(field: &'static str, sizes: [i32; 2]) -> Result<i32, ConfigError> {
    let [a, b] = sizes;
    let product = a.checked_mul(b).filter(|product| *product <= SIZE_MAX);
    product.ok_or_else(|| bad(field, format!("{a} times {b} is more than {SIZE_MAX}")))
}

impl<'a> Fields<'a> {
    fn get(self, field: &str) -> Option<&'a Value> {
        self.0.get(field).filter(|value| !value.is_null())
    }

    /// A positive whole number.
    pub(super) fn size_if(self, field: &'static str) -> Result<Option<i32>, ConfigError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let size = value.as_i64().and_then(|n| i32::try_from(n).ok()).filter(|n| *n > 0);
        let size = size.ok_or_else(|| bad(field, format!("{value} is not a positive number")))?;
        if size > SIZE_MAX {
            return Err(bad(field, format!("{size} is more than {SIZE_MAX}")));
        }
        Ok(Some(size))
    }

    pub(super) fn size_or(self, field: &'static str, default: i32) -> Result<i32, ConfigError> {
        Ok(self.size_if(field)?.unwrap_or(default))
    }

    pub(super) fn size(self, field: &'static str) -> Result<i32, ConfigError> {
        self.size_if(field)?.ok_or_else(|| bad(field, "missing"))
    }

    /// A number of layers or experts.
    pub(super) fn parts(self, field: &'static str) -> Result<i32, ConfigError> {
        parts(field, self.size(field)?)
    }

    /// A whole number from 0.
    pub(super) fn count_or(self, field: &'static str, default: i32) -> Result<i32, ConfigError> {
        let Some(value) = self.get(field) else { return Ok(default) };
        let count = value.as_i64().and_then(|n| i32::try_from(n).ok()).filter(|n| *n >= 0);
        count.ok_or_else(|| bad(field, format!("{value} is not a number from 0")))
    }

    /// A positive number.
    pub(super) fn number_if(self, field: &'static str) -> Result<Option<f32>, ConfigError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let number = value.as_f64().map(|n| n as f32).filter(|n| *n > 0.0 && n.is_finite());
        number.map(Some).ok_or_else(|| bad(field, format!("{value} is not a positive number")))
    }

    pub(super) fn number(self, field: &'static str) -> Result<f32, ConfigError> {
        self.number_if(field)?.ok_or_else(|| bad(field, "missing"))
    }

    pub(super) fn number_or(self, field: &'static str, default: f32) -> Result<f32, ConfigError> {
        Ok(self.number_if(field)?.unwrap_or(default))
    }

    pub(super) fn flag_or(self, field: &'static str, default: bool) -> Result<bool, ConfigError> {
        let Some(value) = self.get(field) else { return Ok(default) };
        value.as_bool().ok_or_else(|| bad(field, format!("{value} is neither true nor false")))
    }

    pub(super) fn text(self, field: &'static str) -> Result<Option<&'a str>, ConfigError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| bad(field, format!("{value} is no text")))
    }

    /// A list of texts or numbers, as JSON values; empty if absent.
    pub(super) fn list(self, field: &'static str) -> Result<&'a [Value], ConfigError> {
        let Some(value) = self.get(field) else { return Ok(&[]) };
        let list = value.as_array().map(Vec::as_slice);
        list.ok_or_else(|| bad(field, format!("{value} is no list")))
    }

    pub(super) fn object(self, field: &'static str) -> Result<Option<Fields<'a>>, ConfigError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let object = value.is_object().then_some(Some(Fields(value)));
        object.ok_or_else(|| bad(field, format!("{value} is no object")))
    }
}
