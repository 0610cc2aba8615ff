//! OpenAPI 3 documents, for clients that explain and validate by them; and an OpenAPI 2 document for
//! older ones.

mod gnostic;

use axum::{
    extract::{Path, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse as _, Response},
};
use serde_json::{Map, Value, json};

use crate::{
    error::ApiError,
    resource::Resource,
    server::{ApiServer, header_text, json_response},
};

const META: &str = "io.k8s.apimachinery.pkg.apis.meta.v1";
const SCHEMAS: &str = "#/components/schemas/";

/// Index of the documents.
pub(crate) async fn index(State(server): State<ApiServer>) -> Response {
    let versions = group_versions(&server);
    let paths: Map<String, Value> = versions
        .iter()
        .map(|version| {
            let path = path_of(version);
            let url = format!("/openapi/v3/{path}");
            (path, json!({"serverRelativeURL": url}))
        })
        .collect();
    json_response(StatusCode::OK, &json!({"paths": paths}))
}

fn group_versions(server: &ApiServer) -> Vec<String> {
    let resources = server.resources().iter();
    let mut versions: Vec<String> = resources.map(|r| r.api_version()).collect();
    versions.sort();
    versions.dedup();
    versions
}

/// Where an `apiVersion` is served.
fn path_of(version: &str) -> String {
    if version.contains('/') { format!("apis/{version}") } else { format!("api/{version}") }
}

/// Document of one group and version.
pub(crate) async fn version_3(
    State(server): State<ApiServer>,
    Path((group, version)): Path<(String, String)>,
) -> Result<Response, ApiError> {
    document_3(&server, &group, &version)
}

/// Document of the core group.
pub(crate) async fn core_version_3(State(server): State<ApiServer>) -> Result<Response, ApiError> {
    document_3(&server, "", "v1")
}

fn document_3(server: &ApiServer, group: &str, version: &str) -> Result<Response, ApiError> {
    let resources: Vec<&Resource> = server
        .resources()
        .iter()
        .map(|r| &**r)
        .filter(|r| r.group == group && r.version == version)
        .collect();
    if resources.is_empty() {
        return Err(ApiError::UnknownPath);
    }
    let document = json!({
        "openapi": "3.0.0",
        "info": info(),
        "paths": paths(&resources),
        "components": {"schemas": schemas(&resources)},
    });
    Ok(json_response(StatusCode::OK, &document))
}

/// Media type of OpenAPI 2 as a protocol buffer, the only form that kubectl reads. Old clients ask
/// for it with an `@` that they themselves can't parse in an answer.
const PROTOBUF_2: &str = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf";

/// The document of version 2: kubectl before 1.27 explains and validates by it, and looks there for
/// what takes a dry run.
pub(crate) async fn version_2(State(server): State<ApiServer>, headers: HeaderMap) -> Response {
    let resources: Vec<&Resource> = server.resources().iter().map(|r| &**r).collect();
    let mut definitions = Value::Object(schemas(&resources));
    make_version_2(&mut definitions);
    let paths = paths_2(&resources);
    let accept = header_text(&headers, header::ACCEPT).unwrap_or_default();
    if accept.replace('@', ".").contains(PROTOBUF_2) {
        let headers = [(header::CONTENT_TYPE, PROTOBUF_2)];
        let document = gnostic::document(TITLE, env!("CARGO_PKG_VERSION"), &paths, &definitions);
        return (StatusCode::OK, headers, document).into_response();
    }
    let document =
        json!({"swagger": "2.0", "info": info(), "paths": paths, "definitions": definitions});
    json_response(StatusCode::OK, &document)
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
            "deletionGracePeriodSeconds": {"type": "integer", "format": "int64"},
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
        "required": ["apiVersion", "kind", "name", "uid"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "name": {"type": "string"},
            "uid": {"type": "string"},
            "controller": {"type": "boolean"},
            "blockOwnerDeletion": {"type": "boolean"},
        },
    });
    let list_meta = json!({
        "type": "object",
        "properties": {
            "resourceVersion": {"type": "string"},
            "continue": {"type": "string"},
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
