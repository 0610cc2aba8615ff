//! OpenAPI 3 documents, for clients that explain and validate by them; and an OpenAPI 2 document for
//! older ones.

mod gnostic;

use std::{collections::BTreeMap, sync::Arc};

use axum::{
    extract::{Path, RawQuery, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse as _, Response},
};
use serde_json::{Map, Value, json};

use crate::{
    clock,
    error::ApiError,
    request::Query,
    resource::Resource,
    server::{ApiServer, header_text},
    tagged::Tagged,
};

const META: &str = "io.k8s.apimachinery.pkg.apis.meta.v1";
const SCHEMAS: &str = "#/components/schemas/";

/// All documents. They change only with the program, and clients keep them by their tags.
#[derive(Debug)]
pub(crate) struct Documents {
    index: Tagged,
    /// By the path below `/openapi/v3/`.
    version_3: BTreeMap<String, Tagged>,
    version_2: Tagged,
    version_2_protobuf: Tagged,
}

impl Documents {
    pub(crate) fn write(resources: &[Arc<Resource>]) -> Self {
        let all: Vec<&Resource> = resources.iter().map(|r| &**r).collect();
        let mut groups: BTreeMap<String, Vec<&Resource>> = BTreeMap::new();
        for resource in &all {
            groups.entry(path_of(&resource.api_version())).or_default().push(resource);
        }
        let version_3: BTreeMap<String, Tagged> = groups
            .into_iter()
            .map(|(path, resources)| (path, Tagged::new(JSON, document_3(&resources))))
            .collect();
        let paths: Map<String, Value> = version_3
            .iter()
            .map(|(path, document)| {
                (path.clone(), json!({"serverRelativeURL": address(path, document)}))
            })
            .collect();
        let index = Tagged::new(JSON, json!({"paths": paths}).to_string());

        let mut definitions = Value::Object(schemas(&all));
        make_version_2(&mut definitions);
        let paths = paths_2(&all);
        let protobuf = gnostic::document(TITLE, env!("CARGO_PKG_VERSION"), &paths, &definitions);
        let json =
            json!({"swagger": "2.0", "info": info(), "paths": paths, "definitions": definitions});
        Self {
            index,
            version_3,
            version_2: Tagged::new(JSON, json.to_string()),
            version_2_protobuf: Tagged::new(PROTOBUF_2, protobuf),
        }
    }
}

/// Where a document is, by its content: who asks there may keep the answer.
fn address(path: &str, document: &Tagged) -> String {
    format!("/openapi/v3/{path}?hash={}", document.hash())
}

/// Where an `apiVersion` is served.
fn path_of(version: &str) -> String {
    if version.contains('/') { format!("apis/{version}") } else { format!("api/{version}") }
}

/// Index of the documents.
pub(crate) async fn index(State(server): State<ApiServer>, headers: HeaderMap) -> Response {
    server.documents().index.respond(&headers)
}

/// Document of one group and version.
pub(crate) async fn version_3(
    State(server): State<ApiServer>,
    Path((group, version)): Path<(String, String)>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    answer_3(&server, &format!("apis/{group}/{version}"), query.as_deref(), &headers)
}

/// Document of the core group.
pub(crate) async fn core_version_3(
    State(server): State<ApiServer>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    answer_3(&server, "api/v1", query.as_deref(), &headers)
}

/// How long a document may be kept whose hash the address names, as in Kubernetes.
const LIFETIME: time::Duration = time::Duration::days(365);

fn answer_3(
    server: &ApiServer,
    path: &str,
    query: Option<&str>,
    headers: &HeaderMap,
) -> Result<Response, ApiError> {
    let document = server.documents().version_3.get(path).ok_or(ApiError::UnknownPath)?;
    let query = Query::parse(query);
    let hash = query.get("hash");
    if hash.is_some_and(|hash| hash != document.hash()) {
        // Of another version of this program: here is the document as it is now.
        let location = [(header::LOCATION, address(path, document))];
        return Ok((StatusCode::MOVED_PERMANENTLY, location).into_response());
    }
    let mut response = document.respond(headers);
    if hash.is_some() {
        let expires = clock::http_date(clock::now() + LIFETIME);
        let headers = response.headers_mut();
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("public, immutable"));
        // The part of the same that kubectl understands.
        headers.extend(expires.parse().ok().map(|expires| (header::EXPIRES, expires)));
    }
    Ok(response)
}

fn document_3(resources: &[&Resource]) -> String {
    let document = json!({
        "openapi": "3.0.0",
        "info": info(),
        "paths": paths(resources),
        "components": {"schemas": schemas(resources)},
    });
    document.to_string()
}

const JSON: &str = "application/json";

/// Media type of OpenAPI 2 as a protocol buffer, the only form that kubectl reads. Old clients ask
/// for it with an `@` that they themselves can't parse in an answer.
const PROTOBUF_2: &str = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf";

/// The document of version 2: kubectl before 1.27 explains and validates by it, and looks there for
/// what takes a dry run.
pub(crate) async fn version_2(State(server): State<ApiServer>, headers: HeaderMap) -> Response {
    let documents = server.documents();
    let accept = header_text(&headers, header::ACCEPT).unwrap_or_default();
    if accept.replace('@', ".").contains(PROTOBUF_2) {
        return documents.version_2_protobuf.respond(&headers);
    }
    documents.version_2.respond(&headers)
}

/// References lead to `definitions`, and there is no `nullable`.
fn make_version_2(schema: &mut Value) {
    match schema {
        Value::Object(fields) => {
            if fields.get("nullable").is_some_and(Value::is_boolean) {
                fields.remove("nullable");
            }
            for (name, value) in fields.iter_mut() {
                match value {
                    Value::String(text) if name == "$ref" => {
                        *text = text.replace(SCHEMAS, "#/definitions/");
                    }
                    other => make_version_2(other),
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(make_version_2),
        _ => {}
    }
}

/// Operations in the words of version 2: parameters have their type themselves, answers their
/// schema.
fn paths_2(resources: &[&Resource]) -> Map<String, Value> {
    let mut paths = paths(resources);
    let methods = paths.values_mut().filter_map(Value::as_object_mut);
    for operation in methods.flat_map(|methods| methods.values_mut()) {
        for parameter in operation["parameters"].as_array_mut().into_iter().flatten() {
            if let Some(fields) = parameter.as_object_mut() {
                fields.remove("schema");
                fields.insert("type".to_owned(), json!("string"));
            }
        }
        operation["produces"] = json!(["application/json"]);
        let schema = json!({"type": "object"});
        operation["responses"] = json!({"200": {"description": "OK", "schema": schema}});
    }
    paths
}

const TITLE: &str = "exo";

fn info() -> Value {
    json!({"title": TITLE, "version": env!("CARGO_PKG_VERSION")})
}

/// Name of a resource's schema: the group reversed, as Kubernetes does it.
fn schema_name(resource: &Resource) -> String {
    let mut group: Vec<&str> = resource.group.split('.').collect();
    group.reverse();
    let group = if resource.group.is_empty() { "core".to_owned() } else { group.join(".") };
    format!("{group}.{}.{}", resource.version, resource.kind)
}

fn schemas(resources: &[&Resource]) -> Map<String, Value> {
    let mut schemas = meta_schemas();
    for resource in resources {
        let name = schema_name(resource);
        let mut schema = resource.schema.structural().clone();
        for (field, about) in [
            ("apiVersion", "Version of this representation of an object."),
            ("kind", "The REST resource that this object represents."),
        ] {
            schema["properties"][field] = json!({"type": "string", "description": about});
        }
        schema["properties"]["metadata"] = json!({
            "description": "Standard object's metadata.",
            "allOf": [{"$ref": format!("{SCHEMAS}{META}.ObjectMeta")}],
        });
        schema["x-kubernetes-group-version-kind"] = json!([group_version_kind(resource)]);
        let list = json!({
            "type": "object",
            "required": ["items"],
            "properties": {
                "apiVersion": {"type": "string"},
                "kind": {"type": "string"},
                "metadata": {"$ref": format!("{SCHEMAS}{META}.ListMeta")},
                "items": {"type": "array", "items": {"$ref": format!("{SCHEMAS}{name}")}},
            },
            "x-kubernetes-group-version-kind": [{
                "group": resource.group, "version": resource.version, "kind": resource.list_kind,
            }],
        });
        schemas.insert(format!("{name}List"), list);
        schemas.insert(name, schema);
    }
    schemas
}

fn group_version_kind(resource: &Resource) -> Value {
    json!({"group": resource.group, "version": resource.version, "kind": resource.kind})
}

/// The part of the shared types that people ask about.
fn meta_schemas() -> Map<String, Value> {
    let text = |about: &str| json!({"type": "string", "description": about});
    let time = |about: &str| json!({"type": "string", "format": "date-time", "description": about});
    let flag = |about: &str| json!({"type": "boolean", "description": about});
    let map = |about: &str| {
        json!({
            "type": "object", "description": about, "additionalProperties": {"type": "string"},
        })
    };
    let object_meta = json!({
        "type": "object",
        "description": "Metadata that every object has.",
        "properties": {
            "name": text("Unique within a namespace; can't be changed."),
            "generateName": text("Prefix of a name that the server makes unique."),
            "namespace": text("The space within which the name is unique."),
            "uid": text("Unique in time and space; set by the server."),
            "resourceVersion": text("Changes with every change of the object; opaque."),
            "generation": {
                "type": "integer", "format": "int64",
                "description": "Counts the changes of the desired state.",
            },
            "creationTimestamp": time("When the object was created."),
            "deletionTimestamp": time("When its deletion was asked for."),
            "deletionGracePeriodSeconds": {
                "type": "integer", "format": "int64",
                "description": "Seconds that it has to end; always 0 here.",
            },
            "labels": map("Keys and values that select and group objects."),
            "annotations": map("Keys and values that tools keep with an object."),
            "finalizers": {
                "type": "array", "items": {"type": "string"},
                "description": "While there are any, a deleted object stays.",
            },
            "managedFields": {
                "type": "array",
                "description": "Which client is responsible for which field.",
                "items": {"type": "object"},
            },
            "ownerReferences": {
                "type": "array",
                "description": "When all of these are gone, so is this object.",
                "items": {"$ref": format!("{SCHEMAS}{META}.OwnerReference")},
            },
        },
    });
    let owner = json!({
        "type": "object",
        "description": "An object to which another one belongs.",
        "required": ["apiVersion", "kind", "name", "uid"],
        "properties": {
            "apiVersion": text("Group and version of the owner."),
            "kind": text("Kind of the owner."),
            "name": text("Name of the owner."),
            "uid": text("Which of the objects that ever had this name; the owner is known by it."),
            "controller": flag("Whether the owner is what manages this object; one owner at most."),
            "blockOwnerDeletion": flag(
                "Whether an owner that is deleted in the foreground waits for this object.",
            ),
        },
    });
    let list_meta = json!({
        "type": "object",
        "description": "Metadata of a list.",
        "properties": {
            "resourceVersion": text("The state that the list shows; a watch can go on from there."),
            "continue": text("Where the list goes on, if it was cut by a limit."),
            "remainingItemCount": {
                "type": "integer", "format": "int64",
                "description": "How many come after it, where no selector narrows the list.",
            },
        },
    });
    [("ObjectMeta", object_meta), ("OwnerReference", owner), ("ListMeta", list_meta)]
        .into_iter()
        .map(|(name, schema)| (format!("{META}.{name}"), schema))
        .collect()
}

/// Operations, with what clients look for: the kind, and that writes take `fieldValidation` and
/// `dryRun`.
fn paths(resources: &[&Resource]) -> Map<String, Value> {
    let mut paths = Map::new();
    for resource in resources {
        let scope = if resource.namespaced { "/namespaces/{namespace}" } else { "" };
        let version = resource.api_version();
        let collection = format!("/{}{scope}/{}", path_of(&version), resource.plural);
        let operation = |action: &str| operation(resource, action);
        paths.insert(
            format!("{collection}/{{name}}"),
            json!({
                "get": operation("get"),
                "put": operation("put"),
                "patch": operation("patch"),
                "delete": operation("delete"),
            }),
        );
        paths.insert(collection, json!({"get": operation("list"), "post": operation("post")}));
    }
    paths
}

fn operation(resource: &Resource, action: &str) -> Value {
    let parameters: &[&str] = match action {
        "put" | "patch" | "post" => &["dryRun", "fieldManager", "fieldValidation"],
        "delete" => &["dryRun", "propagationPolicy"],
        "list" => &["labelSelector", "fieldSelector", "limit", "continue", "watch"],
        _ => &[],
    };
    let parameters: Vec<Value> = parameters
        .iter()
        .map(|name| json!({"name": name, "in": "query", "schema": {"type": "string"}}))
        .collect();
    json!({
        "operationId": format!("{action}{}{}", resource.version, resource.kind),
        "x-kubernetes-action": action,
        "x-kubernetes-group-version-kind": group_version_kind(resource),
        "parameters": parameters,
        "responses": {"200": {
            "description": "OK",
            "content": {"application/json": {"schema": {"type": "object"}}},
        }},
    })
}
