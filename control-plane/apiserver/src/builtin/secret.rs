//! Secrets: texts become data, and what Kubernetes' own types of them must hold.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Map, Value, json};

use crate::error::Cause;

/// Of all data of one secret, as in Kubernetes.
const MAX_BYTES: usize = 1 << 20;
/// Of the name of one value.
const MAX_KEY: usize = 253;

/// `stringData` becomes part of `data`.
pub(super) fn prepare(secret: &mut Value) {
    let texts = secret.as_object_mut().and_then(|fields| fields.remove("stringData"));
    for (name, value) in texts.as_ref().and_then(Value::as_object).into_iter().flatten() {
        if let Some(value) = value.as_str() {
            if !secret.get("data").is_some_and(Value::is_object) {
                secret["data"] = json!({});
            }
            secret["data"][name.as_str()] = json!(STANDARD.encode(value));
        }
    }
}

/// What is wrong with a secret's data; values that are no text are found by the schema.
pub(super) fn faults(secret: &Value) -> Vec<Cause> {
    let none = Map::new();
    let data = secret.get("data").and_then(Value::as_object).unwrap_or(&none);
    let mut causes = Vec::new();
    let mut bytes = 0;
    for (name, value) in data {
        let field = format!("data[{name}]");
        if let Some(problem) = key_problem(name) {
            causes.push(Cause::invalid(&field, format_args!("{}: {problem}", json!(name))));
        }
        match value.as_str().map(|text| STANDARD.decode(text)) {
            Some(Ok(data)) => bytes += data.len(),
            Some(Err(_)) => causes.push(Cause::invalid(field, "must be base64")),
            None => {}
        }
    }
    if bytes > MAX_BYTES {
        causes.push(Cause::too_long("data", MAX_BYTES));
    }
    causes.extend(type_faults(secret, data));
    causes
}

/// What an update changes of what must stay.
pub(super) fn fixed(current: &Value, wanted: &Value) -> Vec<Cause> {
    let is_kept = |field: &str| current.get(field) == wanted.get(field);
    let mut causes = Vec::new();
    if !is_kept("type") {
        let problem = format_args!("{}: field is immutable", wanted["type"]);
        causes.push(Cause::invalid("type", problem));
    }
    if current.get("immutable") == Some(&json!(true)) {
        let changed = ["immutable", "data"].into_iter().filter(|field| !is_kept(field));
        causes.extend(changed.map(|field| Cause {
            reason: "FieldValueForbidden",
            message: "Forbidden: field is immutable when `immutable` is set".to_owned(),
            field: field.to_owned(),
        }));
    }
    causes
}

/// The values that programs look for in a secret of a type.
fn type_faults(secret: &Value, data: &Map<String, Value>) -> Vec<Cause> {
    let missing = |keys: &[&str]| -> Vec<Cause> {
        let absent = keys.iter().filter(|key| !data.contains_key(**key));
        absent.map(|key| Cause::required(format!("data[{key}]"))).collect()
    };
    let account = "kubernetes.io/service-account.name";
    match secret.get("type").and_then(Value::as_str).unwrap_or_default() {
        "kubernetes.io/tls" => missing(&["tls.crt", "tls.key"]),
        "kubernetes.io/ssh-auth" => match data.get("ssh-privatekey").and_then(Value::as_str) {
            None | Some("") => vec![Cause::required("data[ssh-privatekey]")],
            Some(_) => Vec::new(),
        },
        "kubernetes.io/basic-auth" => {
            let faults = missing(&["username", "password"]);
            if faults.len() < 2 { Vec::new() } else { faults }
        }
        "kubernetes.io/dockercfg" => document_faults(data, ".dockercfg"),
        "kubernetes.io/dockerconfigjson" => document_faults(data, ".dockerconfigjson"),
        "kubernetes.io/service-account-token" => {
            let name = &secret["metadata"]["annotations"][account];
            let is_named = name.as_str().is_some_and(|name| !name.is_empty());
            if is_named {
                Vec::new()
            } else {
                vec![Cause::required(format!("metadata.annotations[{account}]"))]
            }
        }
        _ => Vec::new(),
    }
}

fn document_faults(data: &Map<String, Value>, key: &str) -> Vec<Cause> {
    let field = format!("data[{key}]");
    let Some(text) = data.get(key).and_then(Value::as_str) else {
        return vec![Cause::required(&field)];
    };
    type Document = Option<Map<String, Value>>;
    let is_map = |bytes: Vec<u8>| serde_json::from_slice::<Document>(&bytes).is_ok();
    if STANDARD.decode(text).is_ok_and(is_map) {
        return Vec::new();
    }
    // The value itself is secret.
    vec![Cause::invalid(field, "\"<secret contents redacted>\": must be a JSON object")]
}

/// Why a value can't have this name, which may become a file's.
fn key_problem(key: &str) -> Option<String> {
    let is_fine = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if key.len() > MAX_KEY {
        Some(format!("must be no more than {MAX_KEY} characters"))
    } else if key.is_empty() || !key.chars().all(is_fine) {
        Some(
            "a valid config key must consist of alphanumeric characters, '-', '_' or '.'"
                .to_owned(),
        )
    } else if key == "." || key.starts_with("..") {
        Some("must not be '.', and must not start with '..'".to_owned())
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wrong(kind: &str, data: &Value) -> Vec<String> {
        let mut secret = json!({"metadata": {}, "type": kind, "stringData": data});
        prepare(&mut secret);
        faults(&secret).into_iter().map(|cause| cause.field).collect()
    }

    #[test]
    fn keys_can_be_names_of_files() {
        for fine in ["a", "tls.crt", ".hidden", "A_b-9", &"k".repeat(MAX_KEY)] {
            assert_eq!(wrong("Opaque", &json!({fine: "v"})), [""; 0], "{fine}");
        }
        for bad in ["", "a/b", ".", "..", "..a", "é", &"k".repeat(MAX_KEY + 1)] {
            assert_eq!(wrong("Opaque", &json!({bad: "v"})), [format!("data[{bad}]")], "{bad}");
        }
    }

    #[test]
    fn known_types_hold_what_is_looked_for() {
        let tls = "kubernetes.io/tls";
        assert_eq!(wrong(tls, &json!({})), ["data[tls.crt]", "data[tls.key]"]);
        assert_eq!(wrong(tls, &json!({"tls.crt": "c", "tls.key": ""})), [""; 0]);
        for empty in [json!({}), json!({"ssh-privatekey": ""})] {
            assert_eq!(wrong("kubernetes.io/ssh-auth", &empty), ["data[ssh-privatekey]"]);
        }
        let basic = "kubernetes.io/basic-auth";
        assert_eq!(wrong(basic, &json!({"password": "p"})), [""; 0]);
        assert_eq!(wrong(basic, &json!({"p": "p"})), ["data[username]", "data[password]"]);
        let docker = "kubernetes.io/dockerconfigjson";
        assert_eq!(wrong(docker, &json!({".dockerconfigjson": "{\"auths\": {}}"})), [""; 0]);
        for bad in ["{", "[]", "\"x\""] {
            let found = wrong(docker, &json!({".dockerconfigjson": bad}));
            assert_eq!(found, ["data[.dockerconfigjson]"], "{bad}");
        }
        assert_eq!(wrong("kubernetes.io/dockercfg", &json!({})), ["data[.dockercfg]"]);
        let token = "kubernetes.io/service-account-token";
        let account = "metadata.annotations[kubernetes.io/service-account.name]";
        assert_eq!(wrong(token, &json!({})), [account]);
        assert_eq!(wrong("example.com/mine", &json!({})), [""; 0]);
    }
}
