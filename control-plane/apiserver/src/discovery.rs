//! What is served, as clients discover it.

use axum::{
    extract::{Path, State},
    http::StatusCode,
    response::Response,
};
use serde_json::{Value, json};

use crate::{
    error::ApiError,
    resource::Resource,
    server::{ApiServer, json_response},
};

/// Kubernetes' minor version whose wire protocol is spoken.
const KUBERNETES_MINOR: &str = "33";

pub(crate) async fn version() -> Response {
    let version = env!("CARGO_PKG_VERSION");
    json_response(
        StatusCode::OK,
        &json!({
            "major": "1",
            "minor": KUBERNETES_MINOR,
            "gitVersion": format!("v1.{KUBERNETES_MINOR}.0+exo-{version}"),
            "gitCommit": "",
            "gitTreeState": "clean",
            "buildDate": "1970-01-01T00:00:00Z",
            "goVersion": "",
            "compiler": "rustc",
            "platform": format!("{}/{}", std::env::consts::OS, std::env::consts::ARCH),
        }),
    )
}

pub(crate) async fn core_versions() -> Response {
    json_response(
        StatusCode::OK,
        &json!({
            "kind": "APIVersions",
            "versions": ["v1"],
            "serverAddressByClientCIDRs": [],
        }),
    )
}

pub(crate) async fn core_resources() -> Response {
    let namespaces = json!({
        "name": "namespaces",
        "singularName": "namespace",
        "namespaced": false,
        "kind": "Namespace",
        "shortNames": ["ns"],
        "verbs": ["get", "list"],
    });
    json_response(StatusCode::OK, &resource_list("v1", &[namespaces]))
}

pub(crate) async fn groups(State(server): State<ApiServer>) -> Response {
    let mut names: Vec<&str> = server.resources().iter().map(|r| r.group.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    let groups: Vec<Value> =
        names.into_iter().filter_map(|name| group_value(&server, name)).collect();
    json_response(
        StatusCode::OK,
        &json!({"apiVersion": "v1", "kind": "APIGroupList", "groups": groups}),
    )
}

pub(crate) async fn group(
    State(server): State<ApiServer>,
    Path(name): Path<String>,
) -> Result<Response, ApiError> {
    let mut group = group_value(&server, &name).ok_or(ApiError::UnknownPath)?;
    group["apiVersion"] = json!("v1");
    group["kind"] = json!("APIGroup");
    Ok(json_response(StatusCode::OK, &group))
}

fn group_value(server: &ApiServer, name: &str) -> Option<Value> {
    let resources = server.resources();
    let resource = resources.iter().find(|r| r.group == name)?;
    let version = json!({
        "groupVersion": resource.api_version(),
        "version": resource.version,
    });
    Some(json!({
        "name": name,
        "versions": [version],
        "preferredVersion": version,
    }))
}

pub(crate) async fn resources(
    State(server): State<ApiServer>,
    Path((group, version)): Path<(String, String)>,
) -> Result<Response, ApiError> {
    let resources: Vec<Value> = server
        .resources()
        .iter()
        .filter(|r| r.group == group && r.version == version)
        .flat_map(|r| entries(r))
        .collect();
    if resources.is_empty() {
        return Err(ApiError::UnknownPath);
    }
    let list = resource_list(&format!("{group}/{version}"), &resources);
    Ok(json_response(StatusCode::OK, &list))
}

fn resource_list(group_version: &str, resources: &[Value]) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "APIResourceList",
        "groupVersion": group_version,
        "resources": resources,
    })
}

/// A resource and its subresources.
fn entries(resource: &Resource) -> Vec<Value> {
    let mut entry = json!({
        "name": resource.plural,
        "singularName": resource.singular,
        "namespaced": resource.namespaced,
        "kind": resource.kind,
        "verbs": [
            "create", "delete", "deletecollection", "get", "list", "patch", "update", "watch",
        ],
    });
    if !resource.short_names.is_empty() {
        entry["shortNames"] = json!(resource.short_names);
    }
    if !resource.categories.is_empty() {
        entry["categories"] = json!(resource.categories);
    }
    let mut entries = vec![entry];
    if resource.has_status {
        entries.push(json!({
            "name": format!("{}/status", resource.plural),
            "singularName": "",
            "namespaced": resource.namespaced,
            "kind": resource.kind,
            "verbs": ["get", "patch", "update"],
        }));
    }
    entries
}
