//! Lists, read bit by bit: a cluster may have very many shards.

use std::fmt::Debug;

use kube::{Api, Resource, api::ListParams};
use serde::de::DeserializeOwned;

/// Objects in one answer.
const PAGE: u32 = 500;

/// All objects as of one moment, without what says who manages their fields: no decision needs that,
/// and it takes more memory than the rest.
pub(crate) async fn all<K>(api: &Api<K>) -> Result<Vec<K>, kube::Error>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug,
{
    let mut params = ListParams::default().limit(PAGE);
    let mut all = Vec::new();
    loop {
        let mut page = api.list(&params).await?;
        for object in &mut page.items {
            object.meta_mut().managed_fields = None;
        }
        all.append(&mut page.items);
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => params = params.continue_token(&token),
            None => return Ok(all),
        }
    }
}
