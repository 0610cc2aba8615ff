//! Resources as this server knows them: all it needs of a `CustomResourceDefinition`.

use std::{fmt::Write as _, str::FromStr};

use exo_store::Entry;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, CustomResourceDefinitionVersion,
};
use serde_json::Value;

use crate::{
    builtin,
    error::{ApiError, Subject},
    jsonpath::{JsonPath, ParsePathError},
    object,
    schema::{Schema, SchemaError},
};

/// A definition that can't be served.
#[derive(Debug, thiserror::Error)]
#[error("the definition of {resource}")]
pub struct DefinitionError {
    resource: String,
    #[source]
    source: Problem,
}

#[derive(Debug, thiserror::Error)]
enum Problem {
    #[error("no version is served and stored")]
    NoVersion,
    #[error("its version has no schema")]
    NoSchema,
    #[error(transparent)]
    Path(#[from] ParsePathError),
    #[error(transparent)]
    Schema(#[from] SchemaError),
}

/// One column of the Table form.
#[derive(Clone, Debug)]
pub(crate) struct Column {
    pub(crate) name: String,
    pub(crate) kind: String,
    pub(crate) format: String,
    pub(crate) description: String,
    /// Above 0: shown by `-o wide` only.
    pub(crate) priority: i32,
    pub(crate) path: JsonPath,
    /// Where to look if there is nothing at `path`.
    pub(crate) fallbacks: Vec<JsonPath>,
}

/// A field that selectors may name.
#[derive(Clone, Debug)]
pub(crate) struct SelectableField {
    pub(crate) name: String,
    pub(crate) path: JsonPath,
    /// What an object without the field is compared as: of what is true or false, it is false.
    pub(crate) absent: &'static str,
}

/// What clients may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Full,
    ReadOnly,
}

/// Where an object keeps what `autoscaling/v1` Scale shows.
#[derive(Clone, Debug)]
pub(crate) struct ScalePaths {
    pub(crate) spec: Vec<String>,
    pub(crate) status: Vec<String>,
    pub(crate) selector: Option<Vec<String>>,
}

/// One kind of object.
#[derive(Debug)]
pub(crate) struct Resource {
    pub(crate) group: String,
    pub(crate) version: String,
    pub(crate) kind: String,
    pub(crate) list_kind: String,
    pub(crate) plural: String,
    pub(crate) singular: String,
    pub(crate) short_names: Vec<String>,
    pub(crate) categories: Vec<String>,
    pub(crate) namespaced: bool,
    /// There is a `status` subresource.
    pub(crate) has_status: bool,
    pub(crate) columns: Vec<Column>,
    pub(crate) selectable: Vec<SelectableField>,
    pub(crate) schema: Schema,
    /// There is a `scale` subresource.
    pub(crate) scale: Option<ScalePaths>,
    /// One of Kubernetes' own types.
    pub(crate) builtin: bool,
    pub(crate) access: Access,
    /// Group in the keys; types of several groups can share it.
    pub(crate) storage_group: String,
    /// How the text of each object begins, up to the metadata's fields.
    head: String,
}

impl Resource {
    pub(crate) fn from_crd(crd: &CustomResourceDefinition) -> Result<Self, DefinitionError> {
        Self::read(crd).map_err(|source| DefinitionError {
            resource: format!("{}.{}", crd.spec.names.plural, crd.spec.group),
            source,
        })
    }

    fn read(crd: &CustomResourceDefinition) -> Result<Self, Problem> {
        let spec = &crd.spec;
        let names = &spec.names;
        let version =
            spec.versions.iter().find(|v| v.served && v.storage).ok_or(Problem::NoVersion)?;
        let schema = version
            .schema
            .as_ref()
            .and_then(|s| s.open_api_v3_schema.as_ref())
            .ok_or(Problem::NoSchema)?;
        let schema = serde_json::to_value(schema).map_err(SchemaError::Json)?;
        let api_version = api_version(&spec.group, &version.name);
        let head = object::head(&api_version, &names.kind);
        let subresources = version.subresources.as_ref();
        Ok(Self {
            group: spec.group.clone(),
            version: version.name.clone(),
            kind: names.kind.clone(),
            list_kind: match &names.list_kind {
                Some(kind) => kind.clone(),
                None => format!("{}List", names.kind),
            },
            plural: names.plural.clone(),
            singular: match &names.singular {
                Some(name) => name.clone(),
                None => names.kind.to_lowercase(),
            },
            short_names: names.short_names.clone().unwrap_or_default(),
            categories: names.categories.clone().unwrap_or_default(),
            namespaced: spec.scope == "Namespaced",
            has_status: subresources.is_some_and(|s| s.status.is_some()),
            columns: columns(version)?,
            selectable: selectable(version, &schema)?,
            schema: Schema::compile(schema)?,
            scale: subresources.and_then(|s| s.scale.as_ref()).map(|scale| {
                let fields = |path: &str| {
                    path.split('.').filter(|f| !f.is_empty()).map(str::to_owned).collect()
                };
                ScalePaths {
                    spec: fields(&scale.spec_replicas_path),
                    status: fields(&scale.status_replicas_path),
                    selector: scale.label_selector_path.as_deref().map(fields),
                }
            }),
            builtin: false,
            access: Access::Full,
            storage_group: spec.group.clone(),
            head,
        })
    }

    pub(crate) fn api_version(&self) -> String {
        api_version(&self.group, &self.version)
    }

    /// Key of one object in the store.
    pub(crate) fn key(&self, namespace: Option<&str>, name: &str) -> String {
        format!("{}{name}", self.prefix(namespace))
    }

    /// What the keys of all objects begin with: of one namespace, or of all.
    pub(crate) fn prefix(&self, namespace: Option<&str>) -> String {
        let Self { storage_group: group, plural, .. } = self;
        match namespace {
            Some(namespace) => format!("{PREFIX}{group}/{plural}/{namespace}/"),
            None => format!("{PREFIX}{group}/{plural}/"),
        }
    }

    pub(crate) fn is_namespaces(&self) -> bool {
        self.builtin && self.kind == builtin::NAMESPACE
    }

    pub(crate) fn subject(&self, name: &str) -> Subject {
        Subject {
            group: self.group.clone(),
            kind: self.kind.clone(),
            plural: self.plural.clone(),
            name: name.to_owned(),
        }
    }

    pub(crate) fn not_found(&self, name: &str) -> ApiError {
        ApiError::NotFound(self.subject(name))
    }

    /// The object of an entry, with its resource version.
    pub(crate) fn decode(&self, entry: &Entry) -> Result<Value, ApiError> {
        self.decode_at(entry, entry.mod_revision)
    }

    /// The same at another resource version: a deleted object shows the revision of its deletion.
    pub(crate) fn decode_at(&self, entry: &Entry, revision: u64) -> Result<Value, ApiError> {
        let mut object = object::decode_at(entry, revision)?;
        builtin::from_stored(self, &mut object);
        Ok(object)
    }

    /// Whether clients see an object as it is stored, but for its resource version.
    pub(crate) fn is_plain(&self, entry: &Entry) -> bool {
        entry.value.starts_with(&self.head)
    }

    /// Writes the object of an entry without reading it: lists and watches of many objects would
    /// spend most of their time on that. `false`, and nothing is written, where it is not plain.
    pub(crate) fn write_at(&self, text: &mut String, entry: &Entry, revision: u64) -> bool {
        let Some(rest) = entry.value.strip_prefix(&self.head) else {
            return false;
        };
        let comma = if rest.starts_with('}') { "" } else { "," };
        text.reserve(entry.value.len() + RESOURCE_VERSION_BYTES);
        text.push_str(&self.head);
        // Writing into a text can't fail.
        let _ = write!(text, "\"resourceVersion\":\"{revision}\"{comma}");
        text.push_str(rest);
        true
    }

    /// The stored form.
    ///
    /// # Errors
    /// `TooLarge` for more than a request could have brought.
    pub(crate) fn encode(&self, object: &Value) -> Result<String, ApiError> {
        object::encode(object, |object| builtin::to_stored(self, object))
    }

    /// Whether this is what an object says it is.
    pub(crate) fn is_type_of(&self, object: &Value) -> bool {
        object.get("kind").and_then(Value::as_str) == Some(&self.kind)
            && object.get("apiVersion").and_then(Value::as_str) == Some(&self.api_version())
    }
}

/// A resource version in its field takes no more.
const RESOURCE_VERSION_BYTES: usize = 48;

/// Everything of this server is below here.
pub(crate) const PREFIX: &str = "/registry/";

fn api_version(group: &str, version: &str) -> String {
    if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") }
}

fn columns(version: &CustomResourceDefinitionVersion) -> Result<Vec<Column>, ParsePathError> {
    let Some(defined) = &version.additional_printer_columns else {
        return Ok(vec![Column {
            name: "Age".to_owned(),
            kind: "date".to_owned(),
            format: String::new(),
            description: String::new(),
            priority: 0,
            path: JsonPath::from_str(".metadata.creationTimestamp")?,
            fallbacks: Vec::new(),
        }]);
    };
    defined
        .iter()
        .map(|column| {
            Ok(Column {
                name: column.name.clone(),
                kind: column.type_.clone(),
                format: column.format.clone().unwrap_or_default(),
                description: column.description.clone().unwrap_or_default(),
                priority: column.priority.unwrap_or(0),
                path: column.json_path.parse()?,
                fallbacks: Vec::new(),
            })
        })
        .collect()
}

fn selectable(
    version: &CustomResourceDefinitionVersion,
    schema: &Value,
) -> Result<Vec<SelectableField>, ParsePathError> {
    version
        .selectable_fields
        .iter()
        .flatten()
        .map(|field| {
            let name = field.json_path.trim_start_matches('.').to_owned();
            let of_field = name.split('.').try_fold(schema, |s, f| s.get("properties")?.get(f));
            let is_boolean = of_field.is_some_and(|s| s["type"] == "boolean");
            let absent = if is_boolean { "false" } else { "" };
            Ok(SelectableField { name, path: field.json_path.parse()?, absent })
        })
        .collect()
}
