//! The server: its resources, and the way of a request to the verb that answers it.

use std::sync::{Arc, OnceLock};

use axum::{
    Router,
    body::HttpBody as _,
    extract::{Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    middleware,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use bytes::Bytes;
use exo_store::{Entry, Store};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use serde_json::{Value, json};
use tokio::{
    sync::OnceCell,
    time::{Instant, timeout_at},
};

use crate::{
    auth::{self, Identity},
    authorize::{Policy, authorize},
    body, builtin, discovery,
    error::ApiError,
    flow::{Flow, Limits, RequestPlace},
    health,
    metrics::{Metrics, Timer},
    namespace, openapi,
    request::{self, Query, Target, Verb},
    resource::{Access, DefinitionError, Resource},
    review,
    table::Form,
    verbs, wire,
};

/// Resources served from a store. Clones share it.
#[derive(Clone)]
pub struct ApiServer(Arc<Inner>);

struct Inner {
    store: Store,
    resources: Vec<Arc<Resource>>,
    /// The definitions as objects.
    definitions: Vec<Value>,
    seeded: OnceCell<()>,
    documents: OnceLock<openapi::Documents>,
    metrics: Metrics,
    policy: Policy,
    flow: Flow,
}

/// Why a server can't be made.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    #[error(transparent)]
    Definition(#[from] DefinitionError),
    #[error("registering metrics")]
    Metrics(#[source] prometheus::Error),
}

impl ApiServer {
    /// A server of what `crds` define, and of Kubernetes' own types that tools count on; its metrics
    /// go to `registry`.
    pub fn new(
        store: Store,
        crds: &[CustomResourceDefinition],
        registry: &prometheus::Registry,
    ) -> Result<Self, ServerError> {
        Self::with_limits(store, crds, registry, Limits::default())
    }

    /// The same with other limits.
    pub fn with_limits(
        store: Store,
        crds: &[CustomResourceDefinition],
        registry: &prometheus::Registry,
        limits: Limits,
    ) -> Result<Self, ServerError> {
        let defined = crds.iter().map(Resource::from_crd).collect::<Result<Vec<_>, _>>()?;
        let resources: Vec<Arc<Resource>> =
            builtin::resources()?.into_iter().chain(defined).map(Arc::new).collect();
        let definitions = crds.iter().map(discovery::definition).collect();
        let metrics = Metrics::register(registry).map_err(ServerError::Metrics)?;
        let flow = Flow::new(limits);
        let (seeded, documents) = (OnceCell::new(), OnceLock::new());
        // Who makes a server without a policy lets every identity do everything.
        let policy: Policy = Arc::new(|_| Ok(()));
        let inner =
            Inner { store, resources, definitions, seeded, documents, metrics, policy, flow };
        Ok(Self(Arc::new(inner)))
    }

    /// The same with a policy on access, asked before every request on a resource.
    ///
    /// # Panics
    /// When the server is already in use: call it right after [`ApiServer::new`].
    #[must_use]
    pub fn with_policy(mut self, policy: Policy) -> Self {
        Arc::get_mut(&mut self.0).expect("no clone exists yet").policy = policy;
        self
    }

    pub(crate) fn store(&self) -> &Store {
        &self.0.store
    }

    pub(crate) fn resources(&self) -> &[Arc<Resource>] {
        &self.0.resources
    }

    pub(crate) fn namespaces(&self) -> &Resource {
        let namespaces = self.0.resources.iter().find(|r| r.is_namespaces());
        namespaces.expect("they are among the types that every server has")
    }

    /// The definitions as objects.
    pub(crate) fn definitions(&self) -> &[Value] {
        &self.0.definitions
    }

    /// Set once the objects are there that the server itself makes.
    pub(crate) fn seeded(&self) -> &OnceCell<()> {
        &self.0.seeded
    }

    /// What is served, described; written when it is first asked for.
    pub(crate) fn documents(&self) -> &openapi::Documents {
        self.0.documents.get_or_init(|| openapi::Documents::write(&self.0.resources))
    }

    pub(crate) fn policy(&self) -> &Policy {
        &self.0.policy
    }

    pub(crate) fn flow(&self) -> &Flow {
        &self.0.flow
    }

    pub(crate) fn metrics(&self) -> &Metrics {
        &self.0.metrics
    }

    fn resource(&self, target: &Target) -> Option<&Arc<Resource>> {
        self.0.resources.iter().find(|r| {
            r.plural == target.plural && r.group == target.group && r.version == target.version
        })
    }
}

/// The router. Who terminates the connection puts an [`Identity`](crate::Identity) into each
/// request's extensions; without one, all but health and version is refused.
pub fn app(server: ApiServer) -> Router {
    let fixed = [
        ("/healthz", get(health::healthy)),
        ("/healthz/{check}", get(health::live_check)),
        ("/livez", get(health::live)),
        ("/livez/{check}", get(health::live_check)),
        ("/readyz", get(health::ready)),
        ("/readyz/{check}", get(health::ready_check)),
        ("/version", get(discovery::version)),
        ("/api", get(discovery::core_versions)),
        ("/api/v1", get(discovery::core_resources)),
        ("/apis", get(discovery::groups)),
        ("/apis/{group}", get(discovery::group)),
        ("/apis/{group}/{version}", get(discovery::resources)),
        ("/openapi/v2", get(openapi::version_2)),
        ("/openapi/v3", get(openapi::index)),
        ("/openapi/v3/api/v1", get(openapi::core_version_3)),
        ("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", post(review::access)),
        ("/apis/authorization.k8s.io/v1/selfsubjectrulesreviews", post(review::rules)),
        ("/apis/authentication.k8s.io/v1/selfsubjectreviews", post(review::identity)),
        ("/openapi/v3/apis/{group}/{version}", get(openapi::version_3)),
    ];
    let mut router = Router::new().route("/", get(discovery::paths));
    for (path, handler) in fixed {
        // Some clients end these with a slash.
        router = router.route(path, handler.clone()).route(&format!("{path}/"), handler);
    }
    router
        .fallback(resource_request)
        .method_not_allowed_fallback(|| async { ApiError::MethodNotAllowed })
        .layer(middleware::from_fn_with_state(server.clone(), auth::require_identity))
        .layer(middleware::from_fn_with_state(server.clone(), wire::present))
        .with_state(server)
}

/// A request on a resource, all read.
pub(crate) struct Call {
    pub(crate) server: ApiServer,
    pub(crate) verb: Verb,
    pub(crate) resource: Arc<Resource>,
    pub(crate) namespace: Option<String>,
    /// Empty for a collection.
    pub(crate) name: String,
    pub(crate) subresource: Option<Subresource>,
    pub(crate) query: Query,
    pub(crate) form: Form,
    pub(crate) content_type: Option<String>,
    pub(crate) user_agent: Option<String>,
    /// Name of the identity that asks.
    pub(crate) client: String,
    pub(crate) body: Bytes,
    /// When it must be answered; watches take no notice.
    pub(crate) deadline: Instant,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Subresource {
    Status,
    Scale,
}

impl Subresource {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Status => "status",
            Self::Scale => "scale",
        }
    }
}

async fn resource_request(State(server): State<ApiServer>, request: Request) -> Response {
    let Some(target) = Target::parse(request.uri().path()) else {
        return ApiError::UnknownPath.into_response();
    };
    let query = Query::parse(request.uri().query());
    let verb = match Verb::of(request.method(), &target, &query) {
        Ok(verb) => verb,
        // What isn't there has no methods.
        Err(_) if server.resource(&target).is_none() => {
            return ApiError::UnknownPath.into_response();
        }
        Err(error) => return error.into_response(),
    };
    // Watches have a limit of their own.
    let place = match verb {
        Verb::Watch => None,
        _ => match server.flow().request(&server.metrics().in_flight) {
            Ok(place) => Some(place),
            Err(error) => {
                server.metrics().rejected.with_label_values(&["in_flight"]).inc();
                return error.into_response();
            }
        },
    };
    let deadline = match deadline(&server, verb, &query) {
        Ok(deadline) => deadline,
        Err(error) => return error.into_response(),
    };
    let timer = server.metrics().start(verb);
    let asked = Asked { verb, target, query, deadline };
    let result = Box::pin(dispatch(server.clone(), asked, request)).await;
    let mut response = result.unwrap_or_else(IntoResponse::into_response);
    let resource = response.extensions().get().cloned();
    let answered = Answered { timer, resource, code: response.status(), _place: place };
    // A long list is still to be written; of watches, their beginning is what counts.
    if verb != Verb::Watch && response.body().size_hint().exact().is_none() {
        response.extensions_mut().insert(wire::Unwritten { answered: answered.into(), deadline });
    }
    response
}

/// When a request that comes now must be answered.
fn deadline(server: &ApiServer, verb: Verb, query: &Query) -> Result<Instant, ApiError> {
    let limit = server.flow().limits().request;
    let Some(text) = query.get("timeout").filter(|_| verb != Verb::Watch) else {
        return Ok(Instant::now() + limit);
    };
    let wanted = request::duration(text).ok_or_else(|| {
        ApiError::BadRequest(format!("invalid timeout specified in the request URL: {text:?}"))
    })?;
    // As in Kubernetes, none is as good as no wish.
    let wanted = if wanted.is_zero() { limit } else { wanted.min(limit) };
    Ok(Instant::now() + wanted)
}

/// A request but for its body.
struct Asked {
    verb: Verb,
    target: Target,
    query: Query,
    deadline: Instant,
}

/// A request up to the end of its answer: then its place is free, and its time is known.
pub(crate) struct Answered {
    timer: Timer,
    /// Only resources that exist become labels: a client can't make up new series.
    resource: Option<Arc<Resource>>,
    code: StatusCode,
    _place: Option<RequestPlace>,
}

impl Drop for Answered {
    fn drop(&mut self) {
        if let Some(resource) = &self.resource {
            self.timer.observe(&resource.plural, self.code);
        }
    }
}

async fn dispatch(server: ApiServer, asked: Asked, request: Request) -> Result<Response, ApiError> {
    let resource = server.resource(&asked.target).ok_or(ApiError::UnknownPath)?;
    let resource = Arc::clone(resource);
    let (verb, deadline) = (asked.verb, asked.deadline);
    let answer = Box::pin(answer(server, &resource, asked, request));
    let result = match verb {
        Verb::Watch => answer.await,
        // Cancel-safe as far as a client that goes away is: what was written stays so.
        _ => timeout_at(deadline, answer).await.unwrap_or_else(|_| Err(ApiError::late(verb))),
    };
    let mut response = result.unwrap_or_else(IntoResponse::into_response);
    response.extensions_mut().insert(resource);
    Ok(response)
}

async fn answer(
    server: ApiServer,
    resource: &Arc<Resource>,
    asked: Asked,
    request: Request,
) -> Result<Response, ApiError> {
    let Asked { verb, target, query, deadline } = asked;
    check_scope(resource, verb, &target)?;
    let reads = matches!(verb, Verb::Get | Verb::List | Verb::Watch);
    if resource.access == Access::ReadOnly && !reads {
        return Err(ApiError::MethodNotAllowed);
    }
    if resource.access == Access::ReadOnly || resource.is_namespaces() {
        // Reads of what is here need no majority, which making these objects would.
        let is_old = reads && query.get("resourceVersion") == Some("0");
        if !(is_old && namespace::is_seeded(&server)) {
            namespace::seed(&server)
                .await
                .or_else(|error| if is_old { Ok(()) } else { Err(error) })?;
        }
    }
    let subresource = match target.subresource.as_deref() {
        None => None,
        Some("status") if resource.has_status => Some(Subresource::Status),
        Some("scale") if resource.scale.is_some() => Some(Subresource::Scale),
        Some(_) => return Err(ApiError::UnknownPath),
    };
    let (parts, body) = request.into_parts();
    let identity = parts.extensions.get::<Identity>().ok_or(ApiError::Unauthorized)?;
    let text = |name| header_text(&parts.headers, name);
    let is_watch = verb == Verb::Watch;
    let form = Form::negotiate(text(header::ACCEPT), query.get("includeObject"), is_watch)?;
    let content_type = text(header::CONTENT_TYPE)
        .filter(|text| !text.trim().is_empty())
        .map(|t| t.split(';').next().unwrap_or(t).trim().to_ascii_lowercase());
    let call = Call {
        verb,
        resource: Arc::clone(resource),
        namespace: target.namespace,
        name: target.name.unwrap_or_default(),
        subresource,
        query,
        form,
        content_type,
        user_agent: text(header::USER_AGENT).map(str::to_owned),
        client: parts.extensions.get::<Identity>().map(|i| i.name.clone()).unwrap_or_default(),
        body: body::read(body, server.flow().limits().body, deadline).await?,
        deadline,
        server,
    };
    authorize(call.server.policy(), identity, verb, &call).await?;
    if subresource == Some(Subresource::Scale) {
        return match verb {
            Verb::Get => verbs::scale::get(&call).await,
            Verb::Update => verbs::scale::update(&call).await,
            Verb::Patch => verbs::scale::patch(&call).await,
            _ => Err(ApiError::MethodNotAllowed),
        };
    }
    match verb {
        Verb::Get => verbs::get(&call).await,
        Verb::List => verbs::list(&call).await,
        Verb::Watch => verbs::watch(call).await,
        Verb::Create => verbs::create(&call).await,
        Verb::Update => verbs::update(&call).await,
        Verb::Patch => verbs::patch(&call).await,
        Verb::Delete => verbs::delete(&call).await,
        Verb::DeleteCollection => verbs::delete_collection(&call).await,
    }
}

/// Namespaced objects are reached through their namespace; only reading spans all of them.
fn check_scope(resource: &Resource, verb: Verb, target: &Target) -> Result<(), ApiError> {
    match (resource.namespaced, &target.namespace) {
        (false, Some(_)) => Err(ApiError::UnknownPath),
        (true, None) => match verb {
            Verb::List | Verb::Watch => Ok(()),
            Verb::Create | Verb::DeleteCollection => Err(ApiError::MethodNotAllowed),
            Verb::Get | Verb::Update | Verb::Patch | Verb::Delete => Err(ApiError::UnknownPath),
        },
        (true, Some(_)) | (false, None) => Ok(()),
    }
}

pub(crate) fn header_text(headers: &HeaderMap, name: header::HeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok()
}

impl Call {
    /// Key of the named object.
    pub(crate) fn key(&self) -> String {
        self.resource.key(self.namespace.as_deref(), &self.name)
    }

    /// What the store holds of the named object. `resourceVersion=0` means that it may be a
    /// little old.
    pub(crate) async fn read(&self) -> Result<Option<Entry>, ApiError> {
        let store = self.server.store();
        let key = self.key();
        Ok(if self.takes_old() { store.get_local(&key) } else { store.get(&key).await? })
    }

    pub(crate) fn takes_old(&self) -> bool {
        self.query.get("resourceVersion") == Some("0")
    }

    /// Writes shall be tried, not made.
    pub(crate) fn dry_run(&self) -> Result<bool, ApiError> {
        match self.query.get("dryRun") {
            None => Ok(false),
            Some("All") => Ok(true),
            Some(other) => Err(self.unsupported("dryRun", other, &["All"])),
        }
    }

    /// An option has none of the values that it can have.
    pub(crate) fn unsupported(&self, option: &str, value: &str, supported: &[&str]) -> ApiError {
        ApiError::unsupported_option(self.verb.options(), option, value, supported)
    }

    pub(crate) fn not_found(&self) -> ApiError {
        self.resource.not_found(&self.name)
    }

    /// An object in the form that was asked for.
    pub(crate) fn respond(&self, code: StatusCode, object: Value, warnings: &[String]) -> Response {
        let body = self.form.object(&self.resource, object, crate::clock::now());
        warn(json_response(code, &body), warnings)
    }
}

/// As in Kubernetes: longer ones are cut, and when all together are longer the rest is left out.
const MAX_WARNING_CHARS: usize = 256;
const MAX_WARNINGS_BYTES: usize = 4 << 10;

/// Adds warnings to an answer.
pub(crate) fn warn(mut response: Response, warnings: &[String]) -> Response {
    let mut bytes = 0;
    for warning in warnings {
        let text: String = warning.chars().take(MAX_WARNING_CHARS).collect();
        bytes += text.len();
        if bytes > MAX_WARNINGS_BYTES {
            break;
        }
        // Text that can't stand in a header is left out; the warning is only a courtesy.
        if let Ok(value) = HeaderValue::from_str(&format!("299 - {}", json!(text))) {
            response.headers_mut().append(header::WARNING, value);
        }
    }
    response
}

pub(crate) fn json_response(code: StatusCode, body: &Value) -> Response {
    (code, [(header::CONTENT_TYPE, "application/json")], body.to_string()).into_response()
}
