//! `exoctl version`.

use std::io::Write;

use serde_json::Value;

use crate::{
    cli::{Global, Version},
    server::{Form, Server},
};

pub(super) async fn run(
    args: &Version,
    global: &Global,
    out: &mut dyn Write,
) -> anyhow::Result<()> {
    writeln!(out, "Client Version: {}", env!("CARGO_PKG_VERSION"))?;
    if args.client {
        return Ok(());
    }
    let server = Server::connect(global).await?;
    let version: Value = server.get("/version", &[], Form::Json).await?;
    let git = version["gitVersion"].as_str().unwrap_or("unknown");
    writeln!(out, "Server Version: {git}")?;
    Ok(())
}
