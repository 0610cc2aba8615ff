//! The CRD files in `manifests/crds` are what the types say. `EXO_BLESS=1` writes them anew.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::{fs, path::PathBuf};

#[test]
fn crd_files_are_fresh() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../manifests/crds");
    let mut expected = Vec::new();
    for crd in exo_crds::all() {
        let path = folder.join(format!("{}.yaml", crd.spec.names.plural));
        let text = exo_crds::yaml::to_string(&crd).unwrap();
        if std::env::var_os("EXO_BLESS").is_some() {
            fs::create_dir_all(&folder).unwrap();
            fs::write(&path, &text).unwrap();
        }
        let found = fs::read_to_string(&path).unwrap_or_default();
        assert_eq!(found, text, "{} is stale: run `make fix`", path.display());
        expected.push(path);
    }
    for entry in fs::read_dir(&folder).unwrap() {
        let name = entry.unwrap().file_name();
        assert!(
            expected.iter().any(|path| path.file_name() == Some(&name)),
            "{name:?} belongs to no resource: delete it"
        );
    }
}

/// What a real Kubernetes API server refuses in a structural schema.
#[test]
fn schemas_are_structural() {
    fn walk(value: &serde_json::Value, path: &str) {
        if let Some(object) = value.as_object() {
            for forbidden in ["$ref", "definitions", "$defs", "deprecated", "const"] {
                assert!(!object.contains_key(forbidden), "{path}: {forbidden}");
            }
            assert_ne!(object.get("additionalProperties"), Some(&false.into()), "{path}");
            for (key, inner) in object {
                walk(inner, &format!("{path}.{key}"));
            }
        }
    }
    for crd in exo_crds::all() {
        for version in &crd.spec.versions {
            let schema = version.schema.as_ref().unwrap().open_api_v3_schema.as_ref().unwrap();
            walk(&serde_json::to_value(schema).unwrap(), &crd.spec.names.kind);
        }
    }
}
