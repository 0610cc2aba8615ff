//! Requests to the API server, as plain JSON: nothing here knows a kind in advance.

use std::sync::Arc;

use anyhow::Context as _;
use exo_crds::{GROUP, VERSION};
use futures::Stream;
use http::{Method, Request, header};
use kube::{Api, Client, core::DynamicObject, core::WatchEvent};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::sync::OnceCell;

use crate::{
    cli::Global,
    config,
    error::{explain, refused},
    kinds::{Kind, Kinds},
    servers::Servers,
};

/// Asks for a Table; objects are the answer where none can be made.
const AS_TABLE: &str = "application/json;as=Table;g=meta.k8s.io;v=v1,application/json";
const AS_JSON: &str = "application/json";
/// Content types of patches.
pub(crate) const MERGE_PATCH: &str = "application/merge-patch+json";
pub(crate) const JSON_PATCH: &str = "application/json-patch+json";
pub(crate) const APPLY_PATCH: &str = "application/apply-patch+yaml";
pub(crate) const STRATEGIC_PATCH: &str = "application/strategic-merge-patch+json";

/// The servers of a cluster, and what is known of them.
pub(crate) struct Server {
    pub(crate) client: Client,
    servers: Arc<Servers>,
    /// The kubeconfig, as messages call it.
    from: String,
    namespace: Namespace,
    kinds: OnceCell<Kinds>,
    /// That not the server of the kubeconfig is asked.
    pub(crate) note: Option<String>,
}

/// The namespace of what names none itself.
#[derive(Clone, Debug)]
pub(crate) struct Namespace {
    /// Given with `-n`, or the default.
    name: String,
    given: bool,
}

impl Namespace {
    /// What `-n` says, or `default`.
    pub(crate) fn new(global: &Global, default: &str) -> Self {
        Self {
            name: global.namespace.clone().unwrap_or_else(|| default.to_owned()),
            given: global.namespace.is_some(),
        }
    }

    /// The namespace of a document: its own, else the default.
    ///
    /// # Errors
    /// When `-n` says something else than the document.
    pub(crate) fn of(&self, document: &Value) -> anyhow::Result<String> {
        match document["metadata"]["namespace"].as_str() {
            Some(own) if self.given && own != self.name => {
                anyhow::bail!("metadata.namespace is `{own}`, but -n says `{}`", self.name)
            }
            Some(own) => Ok(own.to_owned()),
            None => Ok(self.name.clone()),
        }
    }
}

/// The form of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    Table,
    Json,
}

/// Query parameters.
pub(crate) type Query<'a> = [(&'a str, &'a str)];

impl Server {
    /// Reads the configuration and finds a server that takes connections; asks nothing yet.
    pub(crate) async fn connect(global: &Global) -> anyhow::Result<Self> {
        let (config, others, from) = config::load(global).await?;
        let namespace = Namespace::new(global, &config.default_namespace);
        let (servers, note) = Servers::connect(&config, &others).await?;
        let client = servers.client();
        Ok(Self { client, servers, from, namespace, kinds: OnceCell::new(), note })
    }

    pub(crate) fn namespace(&self) -> &str {
        &self.namespace.name
    }

    /// See [`Namespace::of`].
    pub(crate) fn namespace_of(&self, document: &Value) -> anyhow::Result<String> {
        self.namespace.of(document)
    }

    /// The kinds that the server knows; asked once.
    pub(crate) async fn kinds(&self) -> anyhow::Result<&Kinds> {
        self.kinds.get_or_try_init(|| self.discover()).await
    }

    async fn discover(&self) -> anyhow::Result<Kinds> {
        let mut kinds = Vec::new();
        let groups = self.client.list_api_groups().await;
        for group in groups.map_err(|e| self.explain(e))?.groups {
            let preferred = group.preferred_version.or(group.versions.into_iter().next());
            let Some(preferred) = preferred else { continue };
            let resources = self.client.list_api_group_resources(&preferred.group_version);
            let resources = resources.await.map_err(|e| self.explain(e))?;
            let discovered = |r| Kind::discovered(&group.name, &preferred.version, r);
            kinds.extend(resources.resources.into_iter().filter_map(discovered));
        }
        // A server without the core group is fine: exo's own has little in it.
        if let Ok(core) = self.client.list_core_api_resources("v1").await {
            kinds.extend(core.resources.into_iter().filter_map(|r| Kind::discovered("", "v1", r)));
        }
        Ok(Kinds::new(kinds))
    }

    /// GET of one object or a list.
    pub(crate) async fn get<T: DeserializeOwned>(
        &self,
        path: &str,
        query: &Query<'_>,
        form: Form,
    ) -> anyhow::Result<T> {
        self.ask(Method::GET, &with_query(path, query), form, None).await
    }

    /// One of exo's own kinds.
    pub(crate) async fn own_kind(&self, kind: &str) -> anyhow::Result<&Kind> {
        Ok(self.kinds().await?.find_exact(&format!("{GROUP}/{VERSION}"), kind)?)
    }

    /// GET of an object that may not exist.
    pub(crate) async fn get_if_exists(&self, path: &str) -> anyhow::Result<Option<Value>> {
        match self.get(path, &[], Form::Json).await {
            Ok(object) => Ok(Some(object)),
            Err(error) if refused(&error).is_some_and(|r| r.is_not_found()) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// POST, PUT or DELETE; `body` may be absent.
    pub(crate) async fn send(
        &self,
        method: Method,
        path: &str,
        query: &Query<'_>,
        body: Option<&Value>,
    ) -> anyhow::Result<Value> {
        let body = body.map(|body| (AS_JSON, body));
        self.ask(method, &with_query(path, query), Form::Json, body).await
    }

    /// PATCH; `content_type` says how to read the patch.
    pub(crate) async fn patch(
        &self,
        path: &str,
        content_type: &'static str,
        query: &Query<'_>,
        patch: &Value,
    ) -> anyhow::Result<Value> {
        let body = Some((content_type, patch));
        self.ask(Method::PATCH, &with_query(path, query), Form::Json, body).await
    }

    /// Watches a list.
    pub(crate) async fn watch<T: DeserializeOwned + Clone>(
        &self,
        path: &str,
        query: &Query<'_>,
        form: Form,
    ) -> anyhow::Result<impl Stream<Item = Result<WatchEvent<T>, kube::Error>> + use<T>> {
        let request = request(Method::GET, &with_query(path, query), form, None)?;
        let events = self.client.request_events::<T>(request).await;
        events.map_err(|e| self.explain(e))
    }

    pub(crate) fn explain(&self, error: kube::Error) -> anyhow::Error {
        explain(error, &self.servers.url(), &self.from)
    }

    /// kube's typed access, for its watch helpers.
    pub(crate) fn api(&self, kind: &Kind, namespace: &str) -> Api<DynamicObject> {
        match kind.namespaced {
            true => Api::namespaced_with(self.client.clone(), namespace, &kind.api),
            false => Api::all_with(self.client.clone(), &kind.api),
        }
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        uri: &str,
        form: Form,
        body: Option<(&'static str, &Value)>,
    ) -> anyhow::Result<T> {
        let request = request(method, uri, form, body)?;
        let answer = self.client.request(request).await;
        answer.map_err(|e| self.explain(e))
    }
}

fn request(
    method: Method,
    uri: &str,
    form: Form,
    body: Option<(&'static str, &Value)>,
) -> anyhow::Result<Request<Vec<u8>>> {
    let accept = match form {
        Form::Table => AS_TABLE,
        Form::Json => AS_JSON,
    };
    let content_type = body.map_or(AS_JSON, |(content_type, _)| content_type);
    let body = body.map_or_else(Vec::new, |(_, body)| body.to_string().into_bytes());
    Request::builder()
        .method(method)
        .uri(uri)
        .header(header::ACCEPT, accept)
        .header(header::CONTENT_TYPE, content_type)
        .body(body)
        // Names come from the command line: one with a space makes no URL.
        .with_context(|| format!("`{uri}` is no valid request path"))
}

fn with_query(path: &str, query: &Query<'_>) -> String {
    let mut uri = path.to_owned();
    for (i, (key, value)) in query.iter().enumerate() {
        uri.push(if i == 0 { '?' } else { '&' });
        uri.push_str(key);
        uri.push('=');
        for byte in value.bytes() {
            match byte {
                b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' | b'/' => {
                    uri.push(char::from(byte));
                }
                _ => uri.push_str(&format!("%{byte:02X}")),
            }
        }
    }
    uri
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn query_values_are_escaped() {
        assert_eq!(with_query("/a", &[]), "/a");
        assert_eq!(
            with_query("/a", &[("l", "x=y,z in (1)"), ("watch", "true")]),
            "/a?l=x%3Dy%2Cz%20in%20%281%29&watch=true"
        );
    }
}
