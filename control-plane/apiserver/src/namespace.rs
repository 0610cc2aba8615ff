//! Namespaces, read-only: every valid name is one, and those in use are listed.

use std::collections::BTreeSet;

use axum::{
    extract::{Path, Request, State},
    http::{StatusCode, header},
    response::Response,
};
use exo_store::ListQuery;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use serde_json::{Value, json};

use crate::{
    clock,
    error::ApiError,
    object,
    request::Query,
    resource::{DefinitionError, Resource},
    server::{ApiServer, header_text, json_response},
    table::Form,
};

/// Always there.
const DEFAULT: &str = "default";

/// The definition that gives namespaces their form.
pub(crate) fn resource() -> Result<Resource, DefinitionError> {
    let definition = json!({
        "metadata": {},
        "spec": {
            "group": "",
            "scope": "Cluster",
            "names": {"kind": "Namespace", "plural": "namespaces"},
            "versions": [{
                "name": "v1", "served": true, "storage": true,
                "schema": {"openAPIV3Schema": {"type": "object"}},
                "additionalPrinterColumns": [
                    {"name": "Status", "type": "string", "jsonPath": ".status.phase"},
                ],
            }],
        },
    });
    let definition: CustomResourceDefinition =
        serde_json::from_value(definition).expect("the literal above is a definition");
    Resource::from_crd(&definition)
}

pub(crate) async fn list(
    State(server): State<ApiServer>,
    request: Request,
) -> Result<Response, ApiError> {
    let query = Query::parse(request.uri().query());
    if query.flag("watch")? == Some(true) {
        return Err(ApiError::MethodNotAllowed);
    }
    let form = form(&request)?;
    let (names, revision) = in_use(&server).await?;
    let objects: Vec<Value> = names.iter().map(|name| namespace(name)).collect();
    let metadata = json!({"resourceVersion": revision.to_string()});
    let body = form.list(server.namespaces(), &objects, &metadata, clock::now());
    Ok(json_response(StatusCode::OK, &body))
}

pub(crate) async fn get(
    State(server): State<ApiServer>,
    Path(name): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    let form = form(&request)?;
    let (names, _) = in_use(&server).await?;
    if !names.contains(&name) {
        return Err(server.namespaces().not_found(&name));
    }
    let body = form.object(server.namespaces(), namespace(&name), clock::now());
    Ok(json_response(StatusCode::OK, &body))
}

fn form(request: &Request) -> Result<Form, ApiError> {
    let query = Query::parse(request.uri().query());
    let accept = header_text(request.headers(), header::ACCEPT);
    Form::negotiate(accept, query.get("includeObject"))
}

fn namespace(name: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": name},
        "status": {"phase": "Active"},
    })
}

/// Namespaces that hold an object, and the revision at which they were read.
async fn in_use(server: &ApiServer) -> Result<(BTreeSet<String>, u64), ApiError> {
    let mut names = BTreeSet::from([DEFAULT.to_owned()]);
    let mut revision = 0;
    for resource in server.resources().iter().filter(|r| r.namespaced) {
        let query = ListQuery { prefix: resource.prefix(None), ..ListQuery::default() };
        let listing = server.store().list(&query).await?;
        revision = listing.revision;
        for entry in &listing.entries {
            names.extend(object::decode(entry)?.pointer("/metadata/namespace").and_then(text));
        }
    }
    Ok((names, revision))
}

fn text(value: &Value) -> Option<String> {
    value.as_str().map(str::to_owned)
}
