//! What is served, as clients discover it.

use axum::{
    extract::{Path, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::Response,
};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use serde_json::{Value, json};

use crate::{
    clock,
    error::ApiError,
    resource::{Access, Resource},
    review::REVIEWS,
    server::{ApiServer, Subresource, header_text, json_response},
    tagged::Tagged,
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

/// Where there is something to ask for.
pub(crate) async fn paths(State(server): State<ApiServer>) -> Response {
    let mut paths = vec!["/api".to_owned(), "/api/v1".to_owned(), "/apis".to_owned()];
    for group in group_names(&server) {
        paths.push(format!("/apis/{group}"));
        paths.extend(versions(&server, group).iter().map(|v| format!("/apis/{group}/{v}")));
    }
    let fixed = [
        "/healthz",
        "/healthz/ping",
        "/livez",
        "/livez/ping",
        "/metrics",
        "/openapi/v2",
        "/openapi/v3",
        "/readyz",
        "/readyz/disk",
        "/readyz/ping",
        "/readyz/store",
        "/version",
    ];
    paths.extend(fixed.map(str::to_owned));
    json_response(StatusCode::OK, &json!({"paths": paths}))
}

/// A definition as an object, established.
pub(crate) fn definition(crd: &CustomResourceDefinition) -> Value {
    let mut object = serde_json::to_value(crd).unwrap_or_default();
    let condition = |kind: &str, reason: &str, message: &str| {
        json!({
            "type": kind, "status": "True", "reason": reason, "message": message,
            "lastTransitionTime": clock::format(clock::now()),
        })
    };
    object["status"] = json!({
        "acceptedNames": object["spec"]["names"],
        "storedVersions": crd.spec.versions.iter().filter(|v| v.storage).map(|v| &v.name)
            .collect::<Vec<_>>(),
        "conditions": [
            condition("NamesAccepted", "NoConflicts", "no conflicts found"),
            condition("Established", "InitialNamesAccepted", "the initial names have been accepted"),
        ],
    });
    object
}

/// Versions of aggregated discovery.
const AGGREGATED: [&str; 2] = ["v2", "v2beta1"];

/// The version of aggregated discovery that the client takes.
fn aggregated(headers: &HeaderMap) -> Option<&'static str> {
    let accept = header_text(headers, header::ACCEPT)?;
    accept.split(',').find_map(|range| {
        let has = |parameter: &str| range.split(';').any(|p| p.trim() == parameter);
        let wanted = has("g=apidiscovery.k8s.io") && has("as=APIGroupDiscoveryList");
        let known = AGGREGATED.into_iter().find(|version| has(&format!("v={version}")));
        known.filter(|_| wanted && has("application/json"))
    })
}

/// All versions and resources of some groups in one answer.
fn aggregated_list(
    server: &ApiServer,
    groups: &[&str],
    version: &str,
    headers: &HeaderMap,
) -> Response {
    let items: Vec<Value> = groups.iter().map(|group| aggregated_group(server, group)).collect();
    let body = json!({
        "apiVersion": format!("apidiscovery.k8s.io/{version}"),
        "kind": "APIGroupDiscoveryList",
        "metadata": {},
        "items": items,
    });
    let content_type =
        format!("application/json;g=apidiscovery.k8s.io;v={version};as=APIGroupDiscoveryList");
    let mut response = Tagged::new(&content_type, body.to_string()).respond(headers);
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("public"));
    response
}

fn aggregated_group(server: &ApiServer, group: &str) -> Value {
    let versions = versions(server, group).into_iter().map(|version| {
        let resources: Vec<Value> = entries_of(server, group, version)
            .chunk_by(|_, next| is_subresource(next))
            .filter_map(|entries| entries.split_first())
            .map(|(entry, subresources)| {
                let mut item = aggregated_entry(entry, group, version);
                if !subresources.is_empty() {
                    let name = |e: &Value| {
                        let name = e["name"].as_str().unwrap_or_default();
                        name.split('/').next_back().unwrap_or_default().to_owned()
                    };
                    let subresources = subresources.iter().map(|entry| {
                        json!({
                            "subresource": name(entry),
                            "responseKind": response_kind(entry, group, version),
                            "verbs": entry["verbs"],
                        })
                    });
                    item["subresources"] = subresources.collect();
                }
                item
            })
            .collect();
        json!({"version": version, "resources": resources, "freshness": "Current"})
    });
    let versions: Vec<Value> = versions.collect();
    let metadata = if group.is_empty() { json!({}) } else { json!({"name": group}) };
    json!({"metadata": metadata, "versions": versions})
}

fn is_subresource(entry: &Value) -> bool {
    entry["name"].as_str().is_some_and(|name| name.contains('/'))
}

fn response_kind(entry: &Value, group: &str, version: &str) -> Value {
    json!({
        "group": entry.get("group").and_then(Value::as_str).unwrap_or(group),
        "version": entry.get("version").and_then(Value::as_str).unwrap_or(version),
        "kind": entry["kind"],
    })
}

fn aggregated_entry(entry: &Value, group: &str, version: &str) -> Value {
    let namespaced = entry["namespaced"] == json!(true);
    let mut item = json!({
        "resource": entry["name"],
        "responseKind": response_kind(entry, group, version),
        "scope": if namespaced { "Namespaced" } else { "Cluster" },
        "singularResource": entry["singularName"],
        "verbs": entry["verbs"],
    });
    for field in ["shortNames", "categories"] {
        if let Some(value) = entry.get(field) {
            item[field] = value.clone();
        }
    }
    item
}

pub(crate) async fn core_versions(State(server): State<ApiServer>, headers: HeaderMap) -> Response {
    if let Some(version) = aggregated(&headers) {
        return aggregated_list(&server, &[""], version, &headers);
    }
    json_response(
        StatusCode::OK,
        &json!({
            "kind": "APIVersions",
            "versions": ["v1"],
            "serverAddressByClientCIDRs": [],
        }),
    )
}

pub(crate) async fn core_resources(State(server): State<ApiServer>) -> Response {
    json_response(StatusCode::OK, &resource_list("v1", &entries_of(&server, "", "v1")))
}

/// Names of the groups but the core one, in order.
fn group_names(server: &ApiServer) -> Vec<&str> {
    let defined = server.resources().iter().map(|r| r.group.as_str());
    let mut names: Vec<&str> = defined.chain(REVIEWS.iter().map(|(group, ..)| *group)).collect();
    names.retain(|name| !name.is_empty());
    names.sort_unstable();
    names.dedup();
    names
}

fn versions<'a>(server: &'a ApiServer, group: &str) -> Vec<&'a str> {
    let defined = server.resources().iter().filter(|r| r.group == group);
    let mut versions: Vec<&str> = defined.map(|r| r.version.as_str()).collect();
    if REVIEWS.iter().any(|(of, ..)| *of == group) {
        versions.push("v1");
    }
    versions.sort_unstable();
    versions.dedup();
    versions
}

pub(crate) async fn groups(State(server): State<ApiServer>, headers: HeaderMap) -> Response {
    let names = group_names(&server);
    if let Some(version) = aggregated(&headers) {
        return aggregated_list(&server, &names, version, &headers);
    }
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
    let versions: Vec<Value> = versions(server, name)
        .into_iter()
        .map(|version| json!({"groupVersion": format!("{name}/{version}"), "version": version}))
        .collect();
    let preferred = versions.first()?.clone();
    Some(json!({"name": name, "versions": versions, "preferredVersion": preferred}))
}

pub(crate) async fn resources(
    State(server): State<ApiServer>,
    Path((group, version)): Path<(String, String)>,
) -> Result<Response, ApiError> {
    let resources = entries_of(&server, &group, &version);
    if resources.is_empty() {
        return Err(ApiError::UnknownPath);
    }
    let list = resource_list(&format!("{group}/{version}"), &resources);
    Ok(json_response(StatusCode::OK, &list))
}

/// Each resource, followed by its subresources.
fn entries_of(server: &ApiServer, group: &str, version: &str) -> Vec<Value> {
    let resources = server.resources().iter();
    let mut all: Vec<Value> = resources
        .filter(|r| r.group == group && r.version == version)
        .flat_map(|r| entries(r))
        .collect();
    for (of, kind, plural) in REVIEWS {
        if of == group && version == "v1" {
            all.push(json!({
                "name": plural, "singularName": kind.to_lowercase(), "namespaced": false,
                "kind": kind, "verbs": ["create"],
            }));
        }
    }
    all
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
        "verbs": verbs(resource),
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
            "verbs": SUBRESOURCE_VERBS,
        }));
    }
    if resource.scale.is_some() {
        entries.push(json!({
            "name": format!("{}/scale", resource.plural),
            "singularName": "",
            "namespaced": resource.namespaced,
            "group": "autoscaling",
            "version": "v1",
            "kind": "Scale",
            "verbs": SUBRESOURCE_VERBS,
        }));
    }
    entries
}

const SUBRESOURCE_VERBS: &[&str] = &["get", "patch", "update"];

/// The verbs of a resource and of its subresources.
pub(crate) fn served_verbs(
    resource: &Resource,
) -> impl Iterator<Item = (Option<Subresource>, &'static [&'static str])> {
    let status = resource.has_status.then_some(Subresource::Status);
    let scale = resource.scale.is_some().then_some(Subresource::Scale);
    let subresources = status.into_iter().chain(scale);
    std::iter::once((None, verbs(resource)))
        .chain(subresources.map(|subresource| (Some(subresource), SUBRESOURCE_VERBS)))
}

fn verbs(resource: &Resource) -> &'static [&'static str] {
    match resource.access {
        Access::ReadOnly => &["get", "list", "watch"],
        Access::Full if resource.is_namespaces() => {
            &["create", "delete", "get", "list", "patch", "update", "watch"]
        }
        Access::Full => {
            &["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"]
        }
    }
}
