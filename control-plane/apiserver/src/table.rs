//! Objects in the forms that a client can ask for: whole, as a Table, or metadata only.

use std::sync::Arc;

use serde_json::{Map, Value, json};
use time::OffsetDateTime;

use crate::{
    builtin, clock,
    error::ApiError,
    list::ListBody,
    object,
    resource::{Column, Resource},
};

/// How objects are written into the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    Whole,
    Table(RowObject),
    MetadataOnly,
}

/// A media range without its parameters.
fn media_type(range: &str) -> &str {
    range.split(';').next().unwrap_or_default().trim()
}

/// Whether YAML is what `Accept` names before all else that can be had.
pub(crate) fn wants_yaml(accept: &str) -> bool {
    let mut ranges = accept.split(',');
    let first = ranges.find(|range| Form::of_media_range(range, RowObject::None).is_some());
    first.is_some_and(|range| media_type(range) == YAML)
}

/// What a Table's row carries of its object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RowObject {
    None,
    Metadata,
    Whole,
}

pub(crate) const YAML: &str = "application/yaml";
const ACCEPTED: &str = "application/json, application/yaml, \
                        application/json;as=Table;v=v1;g=meta.k8s.io, \
                        application/json;as=PartialObjectMetadata;v=v1;g=meta.k8s.io";

impl Form {
    /// From the `Accept` header and the `includeObject` parameter. There are no streams of YAML.
    pub(crate) fn negotiate(
        accept: Option<&str>,
        include_object: Option<&str>,
        is_stream: bool,
    ) -> Result<Self, ApiError> {
        let row = match include_object {
            None | Some("" | "Metadata") => RowObject::Metadata,
            Some("None") => RowObject::None,
            Some("Object") => RowObject::Whole,
            Some(other) => {
                return Err(ApiError::BadRequest(format!(
                    "invalid value for includeObject: {other}"
                )));
            }
        };
        let Some(accept) = accept.filter(|a| !a.trim().is_empty()) else {
            return Ok(Self::Whole);
        };
        accept
            .split(',')
            .filter(|range| !is_stream || media_type(range) != YAML)
            .find_map(|range| Self::of_media_range(range, row))
            .ok_or(ApiError::NotAcceptable(ACCEPTED))
    }

    fn of_media_range(range: &str, row: RowObject) -> Option<Self> {
        if !matches!(media_type(range), "application/json" | YAML | "*/*" | "application/*") {
            return None;
        }
        let mut form = Self::Whole;
        for parameter in range.split(';').map(str::trim).skip(1) {
            match parameter.split_once('=') {
                Some(("as", "Table")) => form = Self::Table(row),
                Some(("as", "PartialObjectMetadata" | "PartialObjectMetadataList")) => {
                    form = Self::MetadataOnly;
                }
                Some(("as", _)) => return None,
                Some(("g", group)) if group != "meta.k8s.io" => return None,
                Some(("v", version)) if !matches!(version, "v1" | "v1beta1") => return None,
                // Quality values and charsets change nothing here.
                _ => {}
            }
        }
        Some(form)
    }

    /// One object.
    pub(crate) fn object(self, resource: &Resource, object: Value, now: OffsetDateTime) -> Value {
        match self {
            Self::Whole => object,
            Self::MetadataOnly => partial(&object),
            Self::Table(row) => {
                let version = object::resource_version(&object).unwrap_or_default();
                let metadata = json!({"resourceVersion": version});
                table(resource, &[object], &metadata, row, true, now)
            }
        }
    }

    /// One object of a watch; columns are described with the first one only.
    pub(crate) fn watched(
        self,
        resource: &Resource,
        object: Value,
        first: bool,
        now: OffsetDateTime,
    ) -> Value {
        match self {
            Self::Whole | Self::MetadataOnly => self.object(resource, object, now),
            Self::Table(row) => {
                let version = object::resource_version(&object).unwrap_or_default();
                let metadata = json!({"resourceVersion": version});
                table(resource, &[object], &metadata, row, first, now)
            }
        }
    }

    /// A bookmark's object: nothing but a resource version.
    pub(crate) fn bookmark(self, resource: &Resource, metadata: &Value) -> Value {
        match self {
            Self::Whole => json!({
                "apiVersion": resource.api_version(), "kind": resource.kind, "metadata": metadata,
            }),
            Self::MetadataOnly => json!({
                "apiVersion": "meta.k8s.io/v1", "kind": "PartialObjectMetadata",
                "metadata": metadata,
            }),
            Self::Table(_) => json!({
                "apiVersion": "meta.k8s.io/v1", "kind": "Table", "metadata": metadata,
                "columnDefinitions": [],
                "rows": [{"cells": [], "object": {
                    "apiVersion": "meta.k8s.io/v1", "kind": "PartialObjectMetadata",
                    "metadata": metadata,
                }}],
            }),
        }
    }

    /// One object in a list.
    pub(crate) fn item(self, resource: &Resource, object: Value, now: OffsetDateTime) -> Value {
        match self {
            Self::Whole => object,
            Self::MetadataOnly => partial(&object),
            Self::Table(kind) => row(resource, &object, kind, now),
        }
    }

    /// A list to which the items are added one by one.
    pub(crate) fn begin_list(self, resource: &Arc<Resource>) -> ListBody {
        let (head, items) = match self {
            Self::Whole => {
                let (version, kind) = (resource.api_version(), &resource.list_kind);
                (json!({"apiVersion": version, "kind": kind}), "items")
            }
            Self::MetadataOnly => (
                json!({"apiVersion": "meta.k8s.io/v1", "kind": "PartialObjectMetadataList"}),
                "items",
            ),
            Self::Table(_) => (
                json!({
                    "apiVersion": "meta.k8s.io/v1",
                    "kind": "Table",
                    "columnDefinitions": column_definitions(resource),
                }),
                "rows",
            ),
        };
        let mut text = head.to_string();
        text.pop();
        ListBody::new(Arc::clone(resource), format!("{text},\"{items}\":["))
    }
}

fn partial(object: &Value) -> Value {
    json!({
        "apiVersion": "meta.k8s.io/v1",
        "kind": "PartialObjectMetadata",
        "metadata": object.get("metadata").cloned().unwrap_or_else(|| json!({})),
    })
}

fn table(
    resource: &Resource,
    objects: &[Value],
    metadata: &Value,
    row: RowObject,
    describe_columns: bool,
    now: OffsetDateTime,
) -> Value {
    let rows: Vec<Value> =
        objects.iter().map(|object| self::row(resource, object, row, now)).collect();
    let columns = if describe_columns { column_definitions(resource) } else { Vec::new() };
    json!({
        "apiVersion": "meta.k8s.io/v1",
        "kind": "Table",
        "metadata": metadata,
        "columnDefinitions": columns,
        "rows": rows,
    })
}

fn row(resource: &Resource, object: &Value, kind: RowObject, now: OffsetDateTime) -> Value {
    let mut cells = vec![json!(object::name(object))];
    cells.extend(resource.columns.iter().map(|c| cell(c, object, now)));
    let mut fields = Map::new();
    fields.insert("cells".to_owned(), Value::Array(cells));
    match kind {
        RowObject::None => {}
        RowObject::Metadata => {
            fields.insert("object".to_owned(), partial(object));
        }
        RowObject::Whole => {
            fields.insert("object".to_owned(), object.clone());
        }
    }
    Value::Object(fields)
}

fn column_definitions(resource: &Resource) -> Vec<Value> {
    // Nobody knows events by their names.
    let priority = i32::from(resource.builtin && resource.kind == builtin::EVENT);
    let name = json!({
        "name": "Name", "type": "string", "format": "name", "priority": priority,
        "description": "Name of the object, unique within its namespace.",
    });
    let further = resource.columns.iter().map(|column| {
        json!({
            "name": column.name, "type": column.kind, "format": column.format,
            "description": column.description, "priority": column.priority,
        })
    });
    std::iter::once(name).chain(further).collect()
}

/// `null`, which kubectl prints as nothing, where the object has nothing of the column's type.
fn cell(column: &Column, object: &Value, now: OffsetDateTime) -> Value {
    let paths = std::iter::once(&column.path).chain(&column.fallbacks);
    let Some(value) = paths.filter_map(|p| p.first(object)).find(|value| !value.is_null()) else {
        return Value::Null;
    };
    match column.kind.as_str() {
        "integer" if value.is_i64() || value.is_u64() => value.clone(),
        // How much there is, where it can't be shown.
        "integer" if value.is_object() => json!(value.as_object().map_or(0, Map::len)),
        "number" if value.is_number() => value.clone(),
        "boolean" if value.is_boolean() => value.clone(),
        "date" => {
            let date = value.as_str().and_then(clock::parse);
            Value::String(date.map_or("<unknown>".to_owned(), |date| clock::age(date, now)))
        }
        "string" => match value {
            Value::String(_) | Value::Null => value.clone(),
            Value::Object(fields) => {
                Value::String(reference(fields).unwrap_or_else(|| value.to_string()))
            }
            other => Value::String(other.to_string()),
        },
        _ => Value::Null,
    }
}

/// `kind/name` of what refers to an object.
fn reference(fields: &Map<String, Value>) -> Option<String> {
    let text = |field: &str| fields.get(field).and_then(Value::as_str);
    Some(format!("{}/{}", text("kind")?.to_lowercase(), text("name")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_follow_the_accept_header() {
        let check = |accept: &str, expect: Result<Form, ApiError>| {
            assert_eq!(Form::negotiate(Some(accept), None, false), expect, "{accept}");
        };
        let table = Form::Table(RowObject::Metadata);
        check("application/json", Ok(Form::Whole));
        check("*/*", Ok(Form::Whole));
        check("application/vnd.kubernetes.protobuf,application/json", Ok(Form::Whole));
        check("application/json;as=Table;v=v1;g=meta.k8s.io,application/json", Ok(table));
        check(
            "application/json;as=Table;v=v9;g=meta.k8s.io, application/json;q=0.5",
            Ok(Form::Whole),
        );
        check(
            "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1",
            Ok(Form::MetadataOnly),
        );
        // As Kubernetes' own clients ask, which prefer other forms.
        check("application/vnd.kubernetes.protobuf, */*", Ok(Form::Whole));
        check("application/cbor, application/json;stream=watch", Ok(Form::Whole));
        check(
            "application/vnd.kubernetes.protobuf;as=Table;v=v1;g=meta.k8s.io,\
             application/json;as=Table;v=v1;g=meta.k8s.io,application/json",
            Ok(table),
        );
        for other in ["text/html", "application/vnd.kubernetes.protobuf", "application/cbor"] {
            check(other, Err(ApiError::NotAcceptable(ACCEPTED)));
        }
        assert_eq!(Form::negotiate(None, Some("Object"), false), Ok(Form::Whole));
        assert!(Form::negotiate(None, Some("All"), false).is_err());
    }
}
