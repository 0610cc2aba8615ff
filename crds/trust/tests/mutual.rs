//! Real handshakes over loopback.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::{net::Ipv4Addr, path::Path};

use axum::{Router, extract::ConnectInfo, routing::get};
use exo_trust::{
    Authority, ClientAuth, GROUP_NODES, Peer, Request, Subject, TlsListener, TlsPaths,
    bootstrap_client, reqwest_client, server_config, write_private,
};
use tokio::net::TcpListener;

const NOW_S: u64 = 1_800_000_000;

fn real_now_s() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs()
}

fn node(authority: &Authority, dir: &Path, name: &str) -> TlsPaths {
    std::fs::create_dir_all(dir).unwrap();
    let subject = Subject { name: name.to_owned(), groups: vec![GROUP_NODES.to_owned()] };
    let issued = authority.issue(&subject, Some(&[]), real_now_s()).unwrap();
    let paths = TlsPaths::in_dir(dir);
    write_private(&paths.ca, authority.certificate_pem().as_bytes()).unwrap();
    write_private(&paths.cert, issued.certificate_pem.as_bytes()).unwrap();
    write_private(&paths.key, issued.key_pem.as_bytes()).unwrap();
    paths
}

async fn serve(paths: &TlsPaths, auth: ClientAuth) -> String {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let listener = TlsListener::new(listener, server_config(paths, auth).unwrap()).unwrap();
    let address = axum::serve::Listener::local_addr(&listener).unwrap().address;
    let app = Router::new().route(
        "/",
        get(|ConnectInfo(peer): ConnectInfo<Peer>| async move {
            peer.certificate.map_or("nobody".to_owned(), |s| format!("{} {:?}", s.name, s.groups))
        }),
    );
    let service = app.into_make_service_with_connect_info::<Peer>();
    tokio::spawn(async move { axum::serve(listener, service).await });
    format!("https://{address}/")
}

#[tokio::test]
async fn members_know_each_other_and_strangers_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::open_or_create(&dir.path().join("pki"), real_now_s()).unwrap();
    let server = node(&authority, &dir.path().join("a"), "a");
    let member = reqwest_client(&node(&authority, &dir.path().join("b"), "studio-2")).unwrap();
    let url = serve(&server, ClientAuth::Required).await;

    let text = member.get(&url).send().await.unwrap().text().await.unwrap();
    assert_eq!(text, "studio-2 [\"system:nodes\"]");
    bootstrap_client().unwrap().get(&url).send().await.unwrap_err();

    let other = Authority::open_or_create(&dir.path().join("other"), real_now_s()).unwrap();
    let stranger = reqwest_client(&node(&other, &dir.path().join("c"), "c")).unwrap();
    stranger.get(&url).send().await.unwrap_err();
    // The stranger's own server is refused by members, whatever address it has.
    let fake = serve(&node(&other, &dir.path().join("d"), "d"), ClientAuth::Optional).await;
    member.get(&fake).send().await.unwrap_err();
}

#[tokio::test]
async fn a_renewed_certificate_is_used_without_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::open_or_create(&dir.path().join("pki"), real_now_s()).unwrap();
    // Both ends begin with certificates that have ended.
    let long_ago = real_now_s() - 400 * 86_400;
    let expired = |name: &str| {
        let paths = node(&authority, &dir.path().join(name), name);
        let key = std::fs::read_to_string(&paths.key).unwrap();
        let subject = Subject { name: name.to_owned(), groups: vec![GROUP_NODES.to_owned()] };
        let old = authority.renew(&subject, Some(&[]), &key, long_ago).unwrap();
        write_private(&paths.cert, old.as_bytes()).unwrap();
        (paths, subject, key)
    };
    let (server, client) = (expired("a"), expired("b"));
    let url = serve(&server.0, ClientAuth::Required).await;
    let member = reqwest_client(&client.0).unwrap();
    let renew = |(paths, subject, key): &(TlsPaths, Subject, String)| {
        let new = authority.renew(subject, Some(&[]), key, real_now_s()).unwrap();
        write_private(&paths.cert, new.as_bytes()).unwrap();
    };
    member.get(&url).send().await.unwrap_err();
    renew(&server);
    member.get(&url).send().await.unwrap_err();
    renew(&client);
    let text = member.get(&url).send().await.unwrap().text().await.unwrap();
    assert_eq!(text, "b [\"system:nodes\"]");

    // A file that can't be used leaves the one before it in use.
    write_private(&server.0.cert, b"nonsense").unwrap();
    let fresh = reqwest_client(&client.0).unwrap();
    assert!(fresh.get(&url).send().await.unwrap().status().is_success());
}

#[test]
fn a_request_may_be_for_a_key_that_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::open_or_create(dir.path(), NOW_S).unwrap();
    let first = Request::new().unwrap();
    let again = Request::of_key(first.key_pem.clone()).unwrap();
    assert_eq!(again.key_pem, first.key_pem);
    let subject = Subject { name: "b".to_owned(), groups: vec!["g".to_owned()] };
    let pem = authority.sign(&again.csr_pem, &subject, &[], NOW_S).unwrap();
    assert_eq!(exo_trust::certificate_subject(&pem).unwrap(), subject);
}

#[tokio::test]
async fn optional_authentication_lets_joining_nodes_in_without_a_name() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::open_or_create(&dir.path().join("pki"), real_now_s()).unwrap();
    let url = serve(&node(&authority, &dir.path().join("a"), "a"), ClientAuth::Optional).await;
    let text = bootstrap_client().unwrap().get(&url).send().await.unwrap().text().await.unwrap();
    assert_eq!(text, "nobody");
}

#[test]
fn an_authority_is_the_same_after_a_restart_and_signs_requests() {
    let dir = tempfile::tempdir().unwrap();
    let first = Authority::open_or_create(dir.path(), NOW_S).unwrap();
    let again = Authority::open_or_create(dir.path(), NOW_S + 5).unwrap();
    assert_eq!(first.certificate_pem(), again.certificate_pem());
    let request = Request::new().unwrap();
    let subject = Subject { name: "b".to_owned(), groups: vec![] };
    let pem = again.sign(&request.csr_pem, &subject, &[], NOW_S).unwrap();
    assert!(!exo_trust::certificate_renewal_due(&pem, NOW_S));
    assert!(exo_trust::certificate_renewal_due(&pem, NOW_S + 300 * 86_400));
    assert!(exo_trust::certificate_renewal_due("nonsense", NOW_S));
    assert!(!exo_trust::certificate_expired(&pem, NOW_S + 300 * 86_400));
    assert!(exo_trust::certificate_expired(&pem, NOW_S + 366 * 86_400));
}

#[cfg(unix)]
#[test]
fn keys_are_private_files() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempfile::tempdir().unwrap();
    Authority::open_or_create(dir.path(), NOW_S).unwrap();
    let mode = std::fs::metadata(dir.path().join("ca.key")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn damaged_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("ca.crt"), "x").unwrap();
    let error = server_config(&TlsPaths::in_dir(dir.path()), ClientAuth::Required).unwrap_err();
    assert!(error.to_string().contains("ca.crt"), "{error}");
}

#[test]
fn an_authority_is_adopted_only_with_its_own_key() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let first = Authority::open_or_create(dir.path(), NOW_S).unwrap();
    let stranger = Authority::open_or_create(&dir.path().join("other"), NOW_S).unwrap();
    Authority::adopt(other.path(), first.key_pem()).unwrap_err();
    std::fs::write(other.path().join("ca.crt"), first.certificate_pem()).unwrap();
    Authority::adopt(other.path(), stranger.key_pem()).unwrap_err();
    assert!(!other.path().join("ca.key").exists());
    Authority::adopt(other.path(), first.key_pem()).unwrap();
    let second = Authority::open_or_create(other.path(), NOW_S).unwrap();
    assert_eq!(second.certificate_pem(), first.certificate_pem());
    assert!(!format!("{second:?}").contains("PRIVATE"));
}
