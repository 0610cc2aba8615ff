//! Serves the project's resources from memory, or from a folder that is named as the argument, on
//! a free port of this machine, and prints a kubeconfig for it: a playground for clients.

use std::path::PathBuf;

use exo_apiserver::{ApiServer, Identity, app, collect_garbage, in_process};
use exo_store::{RaftConfig, Store};
use tokio::net::TcpListener;

#[tokio::main]
#[allow(clippy::print_stdout, reason = "the kubeconfig is this program's output")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let store = match std::env::args_os().nth(1) {
        None => Store::memory(),
        Some(dir) => {
            let dir = PathBuf::from(dir);
            Store::raft(RaftConfig {
                dir,
                node_id: 1,
                name: "serve".to_owned(),
                address: address.to_string(),
            })
            .await?
        }
    };
    let server = ApiServer::new(store, &exo_crds::all(), &prometheus::Registry::new())?;
    tokio::spawn(collect_garbage(server.clone(), std::future::pending()));
    let admin = Identity { name: "admin".into(), groups: vec!["system:masters".into()] };
    println!(
        "apiVersion: v1\nkind: Config\ncurrent-context: exo\n\
         clusters: [{{name: exo, cluster: {{server: 'http://{address}'}}}}]\n\
         contexts: [{{name: exo, context: {{cluster: exo, user: exo}}}}]\n\
         users: [{{name: exo, user: {{}}}}]"
    );
    axum::serve(listener, in_process(app(server), admin)).await?;
    Ok(())
}
