//! What a policy on access sees of a request. The policy itself comes from whoever makes the server.

use std::sync::Arc;

use serde_json::Value;

use crate::{
    auth::Identity,
    error::{ApiError, qualified},
    object,
    request::Verb,
    server::{Call, Subresource},
};

/// One request on a resource, as a policy sees it.
#[derive(Clone, Debug)]
pub struct Attributes<'a> {
    pub identity: &'a Identity,
    /// `get`, `list`, `watch`, `create`, `update`, `patch`, `delete`, `deletecollection`; and
    /// `impersonate` of the resources `users` and `groups`.
    pub verb: &'static str,
    pub group: &'a str,
    pub resource: &'a str,
    pub subresource: Option<&'a str>,
    /// Empty for a collection.
    pub name: &'a str,
    /// The named object as it is stored.
    pub object: Option<&'a Value>,
}

/// Says why a request is refused.
pub type Policy = Arc<dyn Fn(&Attributes<'_>) -> Result<(), String> + Send + Sync>;

/// Asks the policy about one request.
pub(crate) async fn authorize(
    policy: &Policy,
    identity: &Identity,
    verb: Verb,
    call: &Call,
) -> Result<(), ApiError> {
    let stored = if call.name.is_empty() { None } else { call.read().await? };
    let object = stored.as_ref().map(object::decode).transpose()?;
    let attributes = Attributes {
        identity,
        verb: verb.policy_name(),
        group: &call.resource.group,
        resource: &call.resource.plural,
        subresource: call.subresource.map(Subresource::name),
        // A new object's name is in its body.
        name: &call.name,
        object: object.as_ref(),
    };
    policy(&attributes).map_err(|reason| {
        let target = match call.name.as_str() {
            "" => qualified(&call.resource.plural, &call.resource.group),
            name => {
                format!("{} \"{name}\"", qualified(&call.resource.plural, &call.resource.group))
            }
        };
        let resource = match attributes.subresource {
            Some(subresource) => format!("{}/{subresource}", attributes.resource),
            None => attributes.resource.to_owned(),
        };
        let scope = match &call.namespace {
            Some(namespace) => format!("in the namespace \"{namespace}\""),
            None => "at the cluster scope".to_owned(),
        };
        let message = format!(
            "{target} is forbidden: User \"{}\" cannot {} resource \"{resource}\" in API group \
             \"{}\" {scope}: {reason}",
            identity.name, attributes.verb, attributes.group
        );
        ApiError::Denied { subject: call.resource.subject(&call.name), message }
    })
}
