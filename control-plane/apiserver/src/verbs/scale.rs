//! The `scale` subresource: `autoscaling/v1` Scale over an object's fields.

use axum::{http::StatusCode, response::Response};
use serde_json::{Value, json};

use super::{patch::Patch, write};
use crate::{
    body::Input,
    error::{ApiError, Cause},
    object,
    resource::ScalePaths,
    server::{Call, json_response, warn},
};

pub(crate) async fn get(call: &Call) -> Result<Response, ApiError> {
    let entry = call.read().await?.ok_or_else(|| call.not_found())?;
    let object = call.resource.decode(&entry)?;
    Ok(json_response(StatusCode::OK, &scale_of(paths(call)?, &object)))
}

pub(crate) async fn update(call: &Call) -> Result<Response, ApiError> {
    let Input { object: wanted, duplicates } = call.body_object()?;
    set(call, &duplicates, |_| Ok(wanted.clone())).await
}

pub(crate) async fn patch(call: &Call) -> Result<Response, ApiError> {
    let patch = Patch::read(call)?;
    set(call, &patch.duplicates, |scale| {
        let mut wanted = scale.clone();
        patch.apply(call, &mut wanted)?;
        Ok(wanted)
    })
    .await
}

fn paths(call: &Call) -> Result<&ScalePaths, ApiError> {
    call.resource.scale.as_ref().ok_or(ApiError::UnknownPath)
}

async fn set(
    call: &Call,
    duplicates: &[String],
    wanted: impl Fn(&Value) -> Result<Value, ApiError>,
) -> Result<Response, ApiError> {
    let paths = paths(call)?;
    let (object, warnings) = write::change(call, duplicates, |current| {
        let scale = wanted(&scale_of(paths, current))?;
        let replicas = replicas(call, &scale)?;
        let mut object = current.clone();
        put(&mut object, &paths.spec, json!(replicas));
        let metadata = |field: &str| object::text(&scale, field).map(|text| json!(text));
        // The client's preconditions hold for the object.
        for field in ["uid", "resourceVersion"] {
            object::set_metadata(&mut object, field, metadata(field));
        }
        Ok(object)
    })
    .await?;
    Ok(warn(json_response(StatusCode::OK, &scale_of(paths, &object)), &warnings))
}

fn replicas(call: &Call, scale: &Value) -> Result<i64, ApiError> {
    let is_scale = scale.get("kind").is_none_or(|kind| kind == "Scale");
    if !is_scale || !scale.is_object() {
        return Err(ApiError::BadRequest("a Scale of autoscaling/v1 is expected here".to_owned()));
    }
    // As in Kubernetes, none is zero.
    let replicas = scale.pointer("/spec/replicas").cloned().unwrap_or(json!(0));
    let fine = replicas.as_i64().filter(|n| (0..=i64::from(i32::MAX)).contains(n));
    fine.ok_or_else(|| ApiError::Invalid {
        subject: call.resource.subject(&call.name),
        causes: vec![Cause::invalid(
            "spec.replicas",
            format_args!("{replicas}: must be greater than or equal to 0"),
        )],
    })
}

fn at<'a>(object: &'a Value, path: &[String]) -> Option<&'a Value> {
    path.iter().try_fold(object, |value, field| value.get(field))
}

/// Makes the maps on the way.
fn put(object: &mut Value, path: &[String], value: Value) {
    let mut place = object;
    for field in path {
        if !place.is_object() {
            *place = json!({});
        }
        place = &mut place[field.as_str()];
    }
    *place = value;
}

fn scale_of(paths: &ScalePaths, object: &Value) -> Value {
    let number = |path| at(object, path).and_then(Value::as_i64).unwrap_or(0);
    let mut metadata = json!({});
    for field in ["name", "namespace", "uid", "resourceVersion", "creationTimestamp"] {
        if let Some(text) = object::text(object, field) {
            metadata[field] = json!(text);
        }
    }
    let mut status = json!({"replicas": number(&paths.status)});
    if let Some(selector) = paths.selector.as_ref().and_then(|path| at(object, path)) {
        status["selector"] = selector.clone();
    }
    json!({
        "apiVersion": "autoscaling/v1",
        "kind": "Scale",
        "metadata": metadata,
        "spec": {"replicas": number(&paths.spec)},
        "status": status,
    })
}
