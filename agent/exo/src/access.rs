//! Who may do what with the cluster's resources: admins everything; a node reads everything but
//! secrets, writes its own Node and what concerns the Shards bound to it, and reports events.

use exo_apiserver::Attributes;
use exo_trust::GROUP_ADMINS;

use crate::data_dir::NODE_USER_PREFIX;

/// The policy. The error says what would have been allowed.
pub(crate) fn allow(request: &Attributes<'_>) -> Result<(), String> {
    let identity = request.identity;
    if identity.groups.iter().any(|group| group == GROUP_ADMINS) {
        return Ok(());
    }
    let Some(node) = identity.name.strip_prefix(NODE_USER_PREFIX) else {
        return Err("only admins and nodes have rights here".to_owned());
    };
    let reads = ["get", "list", "watch"].contains(&request.verb) && request.resource != "secrets";
    let edits = ["update", "patch"].contains(&request.verb);
    let own = match request.resource {
        // An object that is not there yet is named by its body; one that exists is not overwritten.
        "nodes" => request.verb == "create" || (edits && request.name == node),
        "events" => {
            request.verb == "create"
                || (edits && request.object.is_some_and(|e| e["reportingInstance"] == node))
        }
        "shards" => edits && request.object.is_some_and(|shard| shard["spec"]["node"] == node),
        _ => false,
    };
    if reads || own {
        Ok(())
    } else if request.resource == "secrets" {
        Err(format!("node `{node}` has no access to secrets"))
    } else {
        Err(format!("node `{node}` writes only its own Node and the Shards bound to it"))
    }
}

#[cfg(test)]
mod tests {
    use exo_apiserver::Identity;
    use serde_json::{Value, json};

    use super::*;

    fn check(
        user: (&str, &str),
        verb: &'static str,
        (resource, name): (&str, &str),
        object: Option<&Value>,
    ) -> bool {
        let identity = Identity { name: user.0.to_owned(), groups: vec![user.1.to_owned()] };
        let request = Attributes {
            identity: &identity,
            verb,
            group: "exo.dev",
            resource,
            subresource: None,
            name,
            object,
        };
        allow(&request).is_ok()
    }

    #[test]
    fn nodes_write_what_is_theirs_and_nothing_else() {
        let admin = ("exo-admin", "system:masters");
        let node = ("system:node:a", "system:nodes");
        let of_a = json!({"spec": {"node": "a"}});
        let of_b = json!({"spec": {"node": "b"}});
        assert!(check(admin, "deletecollection", ("shards", ""), None));
        assert!(check(admin, "impersonate", ("users", "system:node:a"), None));
        assert!(check(node, "watch", ("inferenceinstances", ""), None));
        assert!(check(node, "create", ("nodes", ""), None));
        assert!(check(node, "patch", ("nodes", "a"), None));
        assert!(check(node, "patch", ("shards", "x"), Some(&of_a)));
        assert!(check(node, "create", ("events", ""), None));
        let told = |by: &str| json!({"reportingInstance": by});
        assert!(check(node, "patch", ("events", "e"), Some(&told("a"))));
        assert!(!check(node, "patch", ("events", "e"), Some(&told("b"))));
        for (verb, target, object) in [
            ("patch", ("nodes", "b"), None),
            ("delete", ("nodes", "a"), None),
            ("patch", ("shards", "x"), Some(&of_b)),
            ("patch", ("shards", "x"), None),
            ("delete", ("shards", "x"), Some(&of_a)),
            ("create", ("shards", ""), None),
            ("get", ("secrets", "keys"), None),
            ("patch", ("inferenceinstances", "i"), None),
            ("create", ("inferenceinstances", ""), None),
            ("deletecollection", ("models", ""), None),
            ("impersonate", ("users", "exo-admin"), None),
            ("impersonate", ("groups", "system:masters"), None),
        ] {
            assert!(!check(node, verb, target, object), "{verb} {target:?}");
        }
        assert!(!check(("system:node:a2", "other"), "patch", ("nodes", "a"), None));
        assert!(!check(("somebody", "people"), "get", ("nodes", "a"), None));
    }
}
