//! Patches that say what to change: JSON patches, merge patches, and strategic merge patches of
//! Kubernetes' own types.

use exo_crds::document;
use serde_json::Value;

use super::{strategic, write::unprocessable};
use crate::{
    body::{MAX_BODY_BYTES, duplicate_fields},
    error::ApiError,
    server::{Call, Subresource},
};

pub(super) const PATCH_TYPES: &str = "application/json-patch+json, \
                                      application/merge-patch+json, application/apply-patch+yaml";
const JSON_PATCH: &str = "application/json-patch+json";
const MERGE_PATCH: &str = "application/merge-patch+json";
const STRATEGIC_PATCH: &str = "application/strategic-merge-patch+json";
pub(super) const APPLY_PATCH: &str = "application/apply-patch+yaml";

/// A patch as read from a request.
pub(super) struct Patch {
    change: Change,
    /// `duplicate field "spec.x"` for each that was given twice.
    pub(super) duplicates: Vec<String>,
}

enum Change {
    Json(json_patch::Patch),
    Merge(Value),
    Strategic(Value),
}

impl Patch {
    pub(super) fn read(call: &Call) -> Result<Self, ApiError> {
        if call.query.get("force").is_some() {
            let message = "Forbidden: may not be specified for non-apply patch";
            let reason = "FieldValueForbidden";
            return Err(ApiError::invalid_option("PatchOptions", reason, "force", message));
        }
        // As in Kubernetes, for its own types only.
        let has_strategies = call.resource.builtin || call.subresource == Some(Subresource::Scale);
        let media_type = match call.content_type.as_deref() {
            Some(JSON_PATCH) => JSON_PATCH,
            Some(MERGE_PATCH) => MERGE_PATCH,
            Some(STRATEGIC_PATCH) if has_strategies => STRATEGIC_PATCH,
            _ => return Err(ApiError::UnsupportedMediaType(PATCH_TYPES)),
        };
        let bad =
            |error: serde_json::Error| ApiError::BadRequest(format!("the patch is bad: {error}"));
        let document = document::from_json(&call.body).map_err(bad)?;
        let mut duplicates = duplicate_fields(&document.duplicates);
        let patch = document.value;
        let change = match media_type {
            JSON_PATCH => {
                for duplicate in &mut duplicates {
                    *duplicate = format!("json patch {duplicate}");
                }
                Change::Json(serde_json::from_value(patch).map_err(bad)?)
            }
            _ if !patch.is_object() => {
                return Err(ApiError::BadRequest("the patch is not an object".to_owned()));
            }
            STRATEGIC_PATCH => Change::Strategic(patch),
            _ => Change::Merge(patch),
        };
        Ok(Self { change, duplicates })
    }

    pub(super) fn apply(&self, call: &Call, object: &mut Value) -> Result<(), ApiError> {
        match &self.change {
            Change::Json(patch) => apply_json_patch(call, object, patch),
            Change::Merge(patch) => {
                json_patch::merge(object, patch);
                Ok(())
            }
            Change::Strategic(patch) => {
                strategic::merge(object, patch);
                Ok(())
            }
        }
    }
}

/// Operations of one JSON patch, as in Kubernetes.
const MAX_PATCH_OPERATIONS: usize = 10_000;

fn apply_json_patch(
    call: &Call,
    object: &mut Value,
    patch: &json_patch::Patch,
) -> Result<(), ApiError> {
    if patch.len() > MAX_PATCH_OPERATIONS {
        return Err(ApiError::TooLarge(MAX_BODY_BYTES));
    }
    // A few copies of copies could fill the memory; as in Kubernetes, they count all together.
    let mut copied_bytes = 0;
    for operation in &patch.0 {
        if tests_absence(object, operation) {
            continue;
        }
        if let json_patch::PatchOperation::Copy(copy) = operation {
            let copied = object.pointer(copy.from.as_str());
            copied_bytes += copied.map_or(0, |value| value.to_string().len());
            if copied_bytes > MAX_BODY_BYTES {
                return Err(ApiError::TooLarge(MAX_BODY_BYTES));
            }
        }
        json_patch::patch(object, std::slice::from_ref(operation))
            .map_err(|error| unprocessable(call, error.to_string()))?;
    }
    Ok(())
}

/// A test for null holds where there is nothing, as in Kubernetes: so clients make sure that a field
/// is not there yet.
fn tests_absence(object: &Value, operation: &json_patch::PatchOperation) -> bool {
    let json_patch::PatchOperation::Test(test) = operation else {
        return false;
    };
    let path = test.path.as_str();
    let Some((parent, _)) = path.rsplit_once('/').filter(|_| test.value.is_null()) else {
        return false;
    };
    object.pointer(path).is_none() && object.pointer(parent).is_some_and(Value::is_object)
}
