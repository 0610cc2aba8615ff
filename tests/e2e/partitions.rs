//! Hosts that don't hear each other, leaders that die: what clients see stays one history.
//!
//! `EXO_TEST_ROUNDS` sets the number of faults; each waits for progress before and after it.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::ensure;
use exo_tests::{
    Admin, Trio, in_the_end,
    linear::{Kind, Op, is_linearizable},
    net::Net,
    wait_for,
};
use reqwest::StatusCode;
use serde_json::{Value, json};

const REGISTERS: u64 = 4;
const CALL_LIMIT: Duration = Duration::from_secs(8);
/// For what must be answered: a slow disk makes who waits for a leader more patient.
const PATIENT_LIMIT: Duration = Duration::from_secs(90);
/// Operations that must succeed before the next fault, and during one.
const PROGRESS: u64 = 60;

/// What all clients together have seen.
struct History {
    begin: Instant,
    next_value: AtomicU64,
    succeeded: AtomicU64,
    ops: Vec<Mutex<Vec<Op>>>,
}

enum Answer {
    /// The value, and what to compare with.
    Value(u64, String),
    Conflict,
    /// Certainly not carried out.
    Refused,
    Unknown,
}

impl History {
    fn now(&self) -> u64 {
        u64::try_from(self.begin.elapsed().as_nanos()).unwrap()
    }

    fn record(&self, register: usize, start: u64, known: bool, kind: Kind) {
        let end = known.then(|| self.now());
        if known {
            self.succeeded.fetch_add(1, Ordering::Relaxed);
        }
        self.ops[register].lock().unwrap().push(Op { start, end, kind });
    }

    fn progress(&self) -> u64 {
        self.succeeded.load(Ordering::Relaxed)
    }
}

fn url(admin: &Admin, register: usize) -> String {
    format!("{}/register-{register}", admin.leases())
}

async fn call(request: reqwest::RequestBuilder) -> Answer {
    let response = match request.send().await {
        Ok(response) => response,
        Err(error) if error.is_connect() => return Answer::Refused,
        Err(_) => return Answer::Unknown,
    };
    match response.status() {
        StatusCode::CONFLICT => Answer::Conflict,
        StatusCode::TOO_MANY_REQUESTS => Answer::Refused,
        // This one promises that nothing was done; others, such as 504, can't.
        StatusCode::SERVICE_UNAVAILABLE => Answer::Refused,
        status if !status.is_success() => Answer::Unknown,
        _ => match response.json::<Value>().await {
            Ok(object) => {
                let text = object["spec"]["holderIdentity"].as_str().unwrap_or_default();
                let version = object["metadata"]["resourceVersion"].as_str().unwrap_or_default();
                Answer::Value(text.parse().unwrap(), version.to_owned())
            }
            Err(_) => Answer::Unknown,
        },
    }
}

fn lease(register: usize, value: u64, version: Option<&str>) -> Value {
    json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
        "metadata": {"name": format!("register-{register}"), "resourceVersion": version},
        "spec": {"holderIdentity": value.to_string()}})
}

/// One client: reads, writes, and compare-and-sets, in an order that its seed decides.
async fn use_registers(admin: Admin, history: Arc<History>, mut seed: u64, stop: Arc<AtomicBool>) {
    while !stop.load(Ordering::Relaxed) {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let register = usize::try_from((seed >> 33) % REGISTERS).unwrap();
        let address = url(&admin, register);
        let put = |value, version: Option<&str>| {
            call(admin.client.put(&address).json(&lease(register, value, version)))
        };
        let start = history.now();
        if (seed >> 50).is_multiple_of(3) {
            let value = history.next_value.fetch_add(1, Ordering::Relaxed);
            match put(value, None).await {
                Answer::Value(..) => history.record(register, start, true, Kind::Write(value)),
                Answer::Unknown => history.record(register, start, false, Kind::Write(value)),
                Answer::Conflict | Answer::Refused => {}
            }
            continue;
        }
        let Answer::Value(from, version) = call(admin.client.get(&address)).await else {
            continue;
        };
        history.record(register, start, true, Kind::Read(from));
        if (seed >> 50) % 3 == 1 {
            let (start, to) = (history.now(), history.next_value.fetch_add(1, Ordering::Relaxed));
            let cas = |done| Kind::Cas { from, to, done };
            match put(to, Some(&version)).await {
                Answer::Value(..) => history.record(register, start, true, cas(true)),
                Answer::Conflict => history.record(register, start, true, cas(false)),
                Answer::Unknown => history.record(register, start, false, cas(true)),
                Answer::Refused => {}
            }
        }
    }
}

/// Waits until clients have got on.
fn wait_for_progress(trio: &Trio, history: &History) {
    let before = history.progress();
    wait_for(
        "operations to succeed",
        || Ok((history.progress() > before + PROGRESS).then_some(())),
    )
    .unwrap_or_else(|error| panic!("{error:#}{}", trio.logs()));
}

#[test]
fn faults_leave_a_history_that_is_linearizable() {
    let Some(net) = Net::start(3).unwrap() else { return };
    let rounds = exo_test_support::setting("EXO_TEST_ROUNDS").unwrap_or(4);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let mut trio = Trio::start_in(&net, &["--no-agent"]).unwrap();
    let admins: Vec<Admin> =
        trio.nodes.iter().map(|exo| Admin::of(exo, CALL_LIMIT).unwrap()).collect();
    for register in 0..usize::try_from(REGISTERS).unwrap() {
        wait_for("a register", || {
            let new = admins[0].client.post(admins[0].leases()).json(&lease(register, 0, None));
            // A try whose end is unknown may have made it.
            let is_there =
                matches!(runtime.block_on(call(new)), Answer::Value(0, _) | Answer::Conflict);
            Ok(is_there.then_some(()))
        })
        .unwrap_or_else(|error| panic!("{error:#}{}", trio.logs()));
    }
    let history = Arc::new(History {
        begin: Instant::now(),
        next_value: AtomicU64::new(1),
        succeeded: AtomicU64::new(0),
        ops: (0..REGISTERS).map(|_| Mutex::default()).collect(),
    });
    let stop = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (0..6_usize)
        .map(|client| {
            let (admin, history) = (admins[client % 3].clone(), Arc::clone(&history));
            let seed = client as u64 + 1;
            runtime.spawn(use_registers(admin, history, seed, Arc::clone(&stop)))
        })
        .collect();
    for round in 0..rounds {
        wait_for_progress(&trio, &history);
        let leader = trio.leader().unwrap();
        let others: Vec<usize> = (0..3).filter(|at| *at != leader).collect();
        match round % 3 {
            0 => {
                net.isolate(leader).unwrap();
                trio.leader_among(&others).unwrap();
                if round == 0 {
                    let patient = Admin::of(&trio.nodes[leader], PATIENT_LIMIT).unwrap();
                    a_minority_says_so(&runtime, &patient);
                }
                wait_for_progress(&trio, &history);
                net.rejoin(leader).unwrap();
            }
            1 => {
                trio.nodes[leader].kill().unwrap();
                trio.leader_among(&others).unwrap();
                wait_for_progress(&trio, &history);
                trio.nodes[leader].restart().unwrap();
            }
            _ => {
                net.isolate(others[0]).unwrap();
                wait_for_progress(&trio, &history);
                net.rejoin(others[0]).unwrap();
            }
        }
        // Whoever was away answers again.
        for admin in &admins {
            wait_for("every node to answer", || {
                let answer = runtime.block_on(call(admin.client.get(url(admin, 0))));
                Ok(matches!(answer, Answer::Value(..)).then_some(()))
            })
            .unwrap_or_else(|error| panic!("{error:#}{}", trio.logs()));
        }
    }
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        runtime.block_on(client).unwrap();
    }
    for (register, ops) in history.ops.iter().enumerate() {
        let ops = ops.lock().unwrap();
        let unknown = ops.iter().filter(|op| op.end.is_none()).count();
        eprintln!("register {register}: {} operations, {unknown} unknown", ops.len());
        assert!(ops.len() > 20, "too little happened");
        assert!(is_linearizable(&ops), "register {register} was not linearizable: {ops:?}");
    }
}

/// A leader that was cut off refuses writes and up-to-date reads, and shows what it had.
fn a_minority_says_so(runtime: &tokio::runtime::Runtime, minority: &Admin) {
    // Who stood still gets no answer at all, and nobody knows at once that the majority is gone.
    let refusal = |request: &dyn Fn() -> reqwest::RequestBuilder| {
        let ask = async || {
            let answer = request().send().await?;
            let (status, text) = (answer.status(), answer.text().await?);
            assert!(matches!(status.as_u16(), 503 | 504), "{status}: {text}");
            ensure!(text.contains("majority") || text.contains("leader"), "{text}");
            Ok(())
        };
        in_the_end("a refusal with its reason", || runtime.block_on(ask())).unwrap();
    };
    let new = json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
        "metadata": {"name": "minority"}, "spec": {}});
    refusal(&|| minority.client.post(minority.leases()).json(&new));
    refusal(&|| minority.client.get(url(minority, 0)));
    let old = format!("{}?resourceVersion=0", url(minority, 0));
    let ask = async || {
        let answer = minority.client.get(&old).send().await?;
        anyhow::Ok((answer.status(), answer.text().await?))
    };
    let (status, text) = in_the_end("what it had", || runtime.block_on(ask())).unwrap();
    assert_eq!(status, StatusCode::OK, "{text}");
}
