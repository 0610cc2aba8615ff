use super::*;

fn parse(args: &[&str]) -> anyhow::Result<Config> {
    let around = Surroundings {
        home: Some("/home/anna".into()),
        host_name: Some("Annas-Mac_Studio.local".to_owned()),
        model_path: Some("/models:relative:/more".into()),
        etcd_password: Some("secret".to_owned()),
    };
    RawArgs::try_parse_from([&["exo"], args].concat())?.check(&around)
}

#[test]
fn without_flags_everything_runs_with_the_documented_defaults() {
    let config = parse(&["--listen", "127.0.0.1"]).unwrap();
    assert_eq!(config.node_name, "annas-mac-studio");
    assert_eq!(config.model_dirs, [PathBuf::from("/models"), PathBuf::from("/more")]);
    assert_eq!(
        config.role,
        Role::ControlPlane {
            gateway: "127.0.0.1:8080".parse().unwrap(),
            api: "127.0.0.1:8443".parse().unwrap(),
            agent: true,
            peers: Vec::new(),
            store: StoreChoice::Raft,
        }
    );
}

#[test]
fn contradictions_say_what_to_add() {
    for (args, needle) in [
        (&["--no-control-plane"][..], "--peers HOST:PORT"),
        (&["--no-control-plane", "--no-agent"], "nothing to run"),
        (&["--no-control-plane", "--peers", "a"], "`a` is not HOST:PORT"),
        (&["--peers", "a:1,b"], "`b` is not HOST:PORT: write b:8443"),
        (&["--peers", "http://a:8443"], "`http://a:8443` is not HOST:PORT: write a:8443"),
        (&["--peers", "https://a/exo"], "write a:8443"),
        (&["--peers", "a:8443/"], "write a:8443"),
        (&["--peers", "a:"], "`a:` is not HOST:PORT"),
        (&["--peers", "fe80::1"], "write [fe80::1]:8443"),
        (&["--peers", "a:0"], "`a:0` is not HOST:PORT"),
        (&["--peers", ":8443"], "`:8443` is not HOST:PORT"),
        (&["--store", "postgres://x"], "is not etcd://HOST:PORT"),
        (&["--store", "etcd://"], "names no server: write etcd://HOST:PORT"),
        (&["--etcd-user", "anna"], "--store"),
        (&["--name", "Bad_Name"], "--name"),
        (&["--cluster=-x"], "--cluster"),
        (&["--allow-origin", "chat.example.org"], "`chat.example.org`"),
        (&["--allow-origin", "https://a,https://b/"], "`https://b/`"),
    ] {
        let error = format!("{:#}", parse(args).unwrap_err());
        assert!(error.contains(needle), "{args:?}: {error}");
    }
}

#[test]
fn the_banner_tells_addresses_that_work() {
    let addresses = Addresses {
        gateway: "0.0.0.0:8080".parse().unwrap(),
        api: "0.0.0.0:8443".parse().unwrap(),
        join: "192.168.1.7:8443".parse().unwrap(),
    };
    let text = banner(&addresses, "/k");
    assert!(text.contains("http://localhost:8080/v1"), "{text}");
    assert!(text.contains("https://localhost:8443"), "{text}");
    assert!(text.ends_with("exo --peers 192.168.1.7:8443\n"), "{text}");
    let join = "127.0.0.1:8444".parse().unwrap();
    let text = banner(&Addresses { join, ..addresses }, "/k");
    assert!(text.ends_with("exo --peers 127.0.0.1:8444   (on this machine only)\n"), "{text}");
}

#[test]
fn origins_are_a_list() {
    let config = parse(&["--allow-origin", "https://a.example:1,app://desk"]).unwrap();
    assert_eq!(config.allowed_origins, ["https://a.example:1", "app://desk"]);
    assert_eq!(parse(&["--allow-origin", "*"]).unwrap().allowed_origins, ["*"]);
}

#[test]
fn a_store_in_etcd_is_built_in_or_refused() {
    let parsed = parse(&["--store", "etcd://a:2379,b:2379", "--etcd-user", "anna"]);
    if !cfg!(feature = "etcd") {
        let error = format!("{:#}", parsed.unwrap_err());
        assert!(error.contains("make build"), "{error}");
        return;
    }
    let config = parsed.unwrap();
    assert!(!format!("{config:?}").contains("secret"));
    let Role::ControlPlane { store: StoreChoice::Etcd(etcd), .. } = config.role else {
        panic!("a control plane with etcd");
    };
    assert_eq!(etcd.endpoints, ["http://a:2379", "http://b:2379"]);
    assert_eq!(etcd.user, Some(("anna".to_owned(), "secret".to_owned())));
    let error = parse(&["--store", "etcd://a"]).unwrap_err();
    assert!(format!("{error:#}").contains("`a` is not HOST:PORT"), "{error:#}");
}

#[test]
fn peers_are_a_list() {
    let config = parse(&["--no-control-plane", "--peers", "127.0.0.1:1,h:2,[::1]:3"]).unwrap();
    assert_eq!(
        config.role,
        Role::Agent { peers: ["127.0.0.1:1", "h:2", "[::1]:3"].map(str::to_owned).to_vec() }
    );
    assert_eq!(config.address, IpAddr::V4(Ipv4Addr::LOCALHOST));
    assert!(config.is_loopback_by_peer);
    let listen = ["--no-control-plane", "--peers", "127.0.0.1:1", "--listen", "127.0.0.1"];
    assert!(!parse(&listen).unwrap().is_loopback_by_peer, "that was asked for");
}
