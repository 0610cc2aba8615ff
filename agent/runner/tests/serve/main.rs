//! `exo-runner serve` as agents and gateways meet it: real processes, real MLX, real certificates.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod client;
mod model;
mod process;

use std::{
    path::Path,
    time::{Duration, Instant},
};

use exo_crds::{
    ShardPhase, ShardingKind,
    generate::{ErrorCode, FinishReason, GenerateEvent},
    runner::RunnerEvent,
};
use futures::StreamExt as _;
use serde_json::{Value, json};

use client::{Client, request};
use process::{Group, Runner};

struct Model(tempfile::TempDir);

impl Model {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        model::write(dir.path(), &[]);
        Self(dir)
    }

    fn group(&self, world_size: usize) -> Group {
        Group::new(world_size, self.path(), model::LAYERS)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

fn client(group: &Group) -> Client {
    Client::new(&group.tls, group.serve)
}

fn with(mut body: Value, field: &str, value: Value) -> Value {
    body[field] = value;
    body
}

#[tokio::test]
async fn one_rank_answers() {
    let model = Model::new();
    let group = model.group(1);
    let mut runners = group.start_all();
    let phases: Vec<_> = (runners[0].seen.iter())
        .filter_map(|event| match event {
            RunnerEvent::Phase { phase, progress_percent } => Some((*progress_percent, *phase)),
            _ => None,
        })
        .collect();
    assert!(phases.is_sorted_by_key(|(percent, _)| *percent), "{phases:?}");
    for phase in [ShardPhase::Connecting, ShardPhase::Loading, ShardPhase::Warming] {
        assert!(phases.iter().any(|(_, p)| *p == phase), "{phases:?}");
    }
    let memory =
        |event: &&RunnerEvent| matches!(event, RunnerEvent::Memory { bytes } if *bytes > 0);
    assert!(runners[0].seen.iter().any(|event| memory(&event)));

    let client = client(&group);
    assert_eq!(client.get("/healthz").await, (200, "ok\n".to_owned()));
    let whole = client.whole(&request("Hello", 24)).await;
    assert_eq!((whole.tokens.len(), whole.reason), (24, FinishReason::Length));
    assert_eq!(client.whole(&request("Hello", 24)).await, whole);

    // Resumed at any token, the rest is the same.
    for cut in [1, 7, 23] {
        let resumed = with(request("Hello", 24), "generated", json!(whole.tokens[..cut]));
        assert_eq!(client.whole(&resumed).await.tokens, whole.tokens[cut..]);
    }
    let whole_already = with(request("Hello", 24), "generated", json!(whole.tokens));
    assert!(client.whole(&whole_already).await.tokens.is_empty());

    // So it is when tokens are drawn by chance; another seed draws others.
    let drawn = |seed: u64| {
        let sampling = json!({"temperature": 1.0, "top_p": 0.9, "seed": seed});
        with(request("Hello", 24), "sampling", sampling)
    };
    let chance = client.whole(&drawn(7)).await;
    assert_ne!(chance.tokens, whole.tokens);
    assert_ne!(client.whole(&drawn(8)).await.tokens, chance.tokens);
    let resumed = with(drawn(7), "generated", json!(chance.tokens[..9]));
    assert_eq!(client.whole(&resumed).await.tokens, chance.tokens[9..]);

    let (status, metrics) = client.get("/metrics").await;
    assert_eq!(status, 200);
    assert!(metrics.contains("exo_runner_tokens_total{kind=\"prompt\"}"), "{metrics}");
    assert_eq!(client.metric("exo_runner_active_sequences").await, 0.0);
    assert!(client.metric("exo_runner_requests_total").await >= 8.0);
    assert!(client.metric("exo_runner_decode_step_seconds_count").await > 100.0);
    let speed = |event: &RunnerEvent| matches!(event, RunnerEvent::Throughput { tokens_per_s } if *tokens_per_s > 0.0);
    if !runners[0].seen.iter().any(speed) {
        runners[0].wait_for(speed);
    }
    runners[0].signal("TERM");
    assert_eq!(runners[0].exit().code(), Some(0));
}

#[tokio::test]
async fn texts_stop_and_logprobs_come() {
    let model = Model::new();
    let group = model.group(1);
    let _runners = group.start_all();
    let client = client(&group);
    let whole = client.whole(&request("Hello", 40)).await;
    let middle = whole.text.chars().count() / 2;
    let stop: String = whole.text.chars().skip(middle).take(3).collect();
    let before = &whole.text[..whole.text.find(&stop).unwrap()];
    let stopped = client.whole(&with(request("Hello", 40), "stop", json!([stop]))).await;
    assert_eq!((stopped.text.as_str(), stopped.reason), (before, FinishReason::Stop));

    let mut stream = client.stream(&with(request("Hello", 4), "logprobs", json!(3))).await;
    let mut found = 0;
    while let Some(event) = stream.next().await {
        if let GenerateEvent::Token { id, logprobs, .. } = event {
            let logprobs = logprobs.expect("they were asked for");
            assert_eq!(logprobs.top.len(), 3);
            // Greedy: the likeliest is the one.
            assert_eq!((logprobs.top[0].id, logprobs.top[0].logprob), (id, logprobs.logprob));
            assert!(logprobs.logprob <= 0.0);
            found += 1;
        }
    }
    assert_eq!(found, 4);
}

#[tokio::test]
async fn bad_requests_are_refused_with_the_field() {
    let model = Model::new();
    let group = model.group(1);
    let _runners = group.start_all();
    let client = client(&group);
    for (body, code, part) in [
        (with(request("x", 1), "promt", json!(1)), ErrorCode::InvalidRequest, "promt"),
        (with(request("x", 1), "stop", json!([""])), ErrorCode::InvalidRequest, "stop[0]"),
        (
            with(request("x", 1), "sampling", json!({"logit_bias": {"1280": 1}})),
            ErrorCode::InvalidRequest,
            "sampling.logit_bias[1280]",
        ),
        (with(request("x", 1), "generated", json!([1280])), ErrorCode::InvalidRequest, "1280"),
        (request("x", model::CONTEXT), ErrorCode::ContextLengthExceeded, "max_tokens"),
        (json!([]), ErrorCode::InvalidRequest, ""),
    ] {
        let (status, refusal) = client.refusal(&body).await;
        assert_eq!(status, 400);
        let GenerateEvent::Error { code: found, message } = refusal else { panic!("{refusal:?}") };
        assert_eq!(found, code);
        assert!(message.contains(part), "{message}");
    }
    // Still well.
    assert_eq!(client.whole(&request("x", 3)).await.tokens.len(), 3);

    // Only members of the cluster get in.
    let stranger = exo_trust::bootstrap_client().unwrap();
    assert!(stranger.get(format!("https://{}/healthz", group.serve)).send().await.is_err());
}

#[tokio::test]
async fn requests_run_side_by_side_and_may_be_cancelled() {
    side_by_side(2, ShardingKind::Pipeline).await;
}

/// What was begun for a request that is cancelled must be dropped by all ranks alike.
#[tokio::test]
async fn so_they_do_on_more_ranks_and_in_teams() {
    side_by_side(3, ShardingKind::Pipeline).await;
    side_by_side(2, ShardingKind::Tensor).await;
}

async fn side_by_side(world_size: usize, sharding: ShardingKind) {
    let model = Model::new();
    let mut group = model.group(world_size);
    group.sharding = sharding;
    let _runners = group.start_all();
    let client = client(&group);
    let alone = client.whole(&request("Hello", 12)).await;

    // A long answer does not hold up short ones, and they don't disturb each other.
    let mut long = client.stream(&request("Good day", 400)).await;
    for _ in 0..5 {
        long.next().await.unwrap();
    }
    let (a, b) = (request("Hello", 12), request("Hello", 12));
    let (first, second) = tokio::join!(client.whole(&a), client.whole(&b));
    assert_eq!((&first, &second), (&alone, &alone));
    assert_eq!(client.metric("exo_runner_active_sequences").await, 1.0);

    let made = client.metric("exo_runner_decode_step_seconds_count").await;
    drop(long);
    let deadline = Instant::now() + process::LIMIT;
    while client.metric("exo_runner_active_sequences").await > 0.0 {
        assert!(Instant::now() < deadline, "the request was not cancelled");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let after = client.metric("exo_runner_decode_step_seconds_count").await;
    assert!(after - made < 300.0, "it went on for {} steps", after - made);
    assert_eq!(client.whole(&request("Hello", 12)).await, alone);
}

#[tokio::test]
async fn more_requests_than_places_wait_and_the_rest_is_sent_away() {
    let model = Model::new();
    let group = model.group(1);
    let _runners = group.start_all();
    let client = client(&group);
    let mut streams = Vec::new();
    for _ in 0..4 + 256 {
        streams.push(client.stream(&request("Hello", model::CONTEXT / 4 - 16)).await);
    }
    let (status, refusal) = client.refusal(&request("Hello", 1)).await;
    assert_eq!(status, 503);
    assert!(matches!(refusal, GenerateEvent::Error { code: ErrorCode::Unavailable, .. }));
    let response = client.post(&request("Hello", 1)).await;
    assert_eq!(response.headers()["retry-after"], "1");
    assert_eq!(client.metric("exo_runner_active_sequences").await, 4.0);
    assert!(client.metric("exo_runner_waiting_requests").await > 200.0);
}

#[tokio::test]
async fn whoever_is_put_off_for_lack_of_memory_goes_on_later() {
    let model = Model::new();
    let mut group = model.group(1);
    group.context_length = 512;
    let _runners = group.start_all();
    let client = client(&group);
    let sampling = |seed: u64| json!({"temperature": 1.0, "seed": seed, "presence_penalty": 0.5});
    let body = |seed: u64| with(request("Hello", 300), "sampling", sampling(seed));
    let mut expected = Vec::new();
    for seed in 0..3 {
        expected.push(client.whole(&body(seed)).await);
    }
    // Each alone has room for all of its answer, three have not.
    let (a, b, c) = (body(0), body(1), body(2));
    let (a, b, c) = tokio::join!(client.whole(&a), client.whole(&b), client.whole(&c));
    assert_eq!([a, b, c].as_slice(), expected);
    assert!(client.metric("exo_runner_put_off_total").await >= 1.0);
    assert_eq!(client.metric("exo_runner_active_sequences").await, 0.0);
}

#[tokio::test]
async fn answers_are_made_together_and_are_the_same_as_alone() {
    let model = Model::new();
    let mut group = model.group(1);
    group.max_concurrency = 8;
    let _runners = group.start_all();
    let client = client(&group);
    let bodies: Vec<Value> = (0..8)
        .map(|n| {
            let sampling = json!({"temperature": 0.3 * f64::from(n), "seed": n, "top_k": 20});
            let prompt = "Good day. ".repeat(1 + 9 * n as usize);
            with(request(&prompt, 60), "sampling", sampling)
        })
        .collect();
    let mut alone = Vec::new();
    for body in &bodies {
        alone.push(client.whole(body).await);
    }
    let steps = client.metric("exo_runner_decode_batch_sequences_count").await;
    let together: Vec<_> =
        futures::stream::iter(&bodies).map(|body| client.whole(body)).buffered(8).collect().await;
    assert_eq!(together, alone);
    let steps = client.metric("exo_runner_decode_batch_sequences_count").await - steps;
    assert!(steps < 4.0 * 60.0, "{steps} steps for 8 answers of 60 tokens");
}

/// How tokens are drawn does not depend on how the model is split.
#[tokio::test]
async fn sampling_is_the_same_on_any_number_of_ranks() {
    let model = Model::new();
    let samplings = [
        json!({"temperature": 0.0, "repetition_penalty": 1.2}),
        json!({"temperature": 0.8, "top_p": 0.95, "seed": 3, "frequency_penalty": 0.3}),
        json!({"temperature": 1.2, "top_k": 30, "seed": 4, "presence_penalty": 1.0,
               "logit_bias": {"17": 4.0, "5": -100}}),
        json!({"temperature": 1.0, "min_p": 0.05, "seed": u64::MAX}),
    ];
    let mut expected: Option<Vec<_>> = None;
    for (world_size, sharding) in [
        (1, ShardingKind::Pipeline),
        (2, ShardingKind::Pipeline),
        (2, ShardingKind::Tensor),
        (4, ShardingKind::Pipeline),
        (4, ShardingKind::Tensor),
    ] {
        let mut group = model.group(world_size);
        group.sharding = sharding;
        let _runners = group.start_all();
        let client = client(&group);
        let bodies: Vec<Value> = (samplings.iter())
            .map(|sampling| with(request("Hello", 16), "sampling", sampling.clone()))
            .collect();
        let answers: Vec<_> = futures::stream::iter(&bodies)
            .map(|body| client.whole(body))
            .buffered(4)
            .collect()
            .await;
        let resumed = with(bodies[1].clone(), "generated", json!(answers[1].tokens[..7]));
        assert_eq!(client.whole(&resumed).await.tokens, answers[1].tokens[7..]);
        match &expected {
            None => expected = Some(answers),
            Some(expected) => assert_eq!(&answers, expected, "{sharding:?} on {world_size}"),
        }
    }
}

/// Less than a fiftieth of a core, also after work.
#[tokio::test]
async fn ranks_that_wait_use_no_processor() {
    let model = Model::new();
    let group = model.group(2);
    let runners = group.start_all();
    client(&group).whole(&request("Hello", 8)).await;
    let spent = || -> Option<Vec<_>> { runners.iter().map(Runner::processor_time).collect() };
    // Not every system says.
    let Some(before) = spent() else { return };
    let began = Instant::now();
    tokio::time::sleep(Duration::from_secs(5)).await;
    let after = spent().unwrap();
    for (rank, (before, after)) in before.into_iter().zip(after).enumerate() {
        let share = (after - before).as_secs_f64() / began.elapsed().as_secs_f64();
        println!("rank {rank}: {:.2} % of a core", 100.0 * share);
        assert!(share < 0.02, "rank {rank}: {:.2} % of a core", 100.0 * share);
    }
}

#[tokio::test]
async fn two_ranks_answer_as_one_and_miss_each_other() {
    let model = Model::new();
    let body = with(
        request("Hello", 30),
        "sampling",
        json!({"temperature": 0.8, "top_p": 0.95, "seed": 3}),
    );
    let group = model.group(1);
    let mut runners = group.start_all();
    let expected = client(&group).whole(&body).await;
    // The agent is gone: so is the runner.
    runners[0].stdin = None;
    assert_eq!(runners[0].exit().code(), Some(0));

    let group = model.group(2);
    let mut runners = group.start_all();
    let client = client(&group);
    assert_eq!(client.whole(&body).await, expected);

    let mut stream = client.stream(&request("Hello", 500)).await;
    for _ in 0..3 {
        stream.next().await.unwrap();
    }
    let killed = Instant::now();
    runners[1].signal("KILL");
    let (reason, message, permanent) = runners[0].failure();
    assert!(message.contains("rank 1"), "{reason}: {message}");
    assert!(!permanent);
    assert_eq!(runners[0].exit().code(), Some(1));
    assert!(killed.elapsed() < Duration::from_secs(10));
    while stream.next().await.is_some() {}
}

#[tokio::test]
async fn a_stop_reaches_all_ranks() {
    let model = Model::new();
    let group = model.group(2);
    let mut runners = group.start_all();
    runners[0].signal("TERM");
    for runner in &mut runners {
        assert_eq!(runner.exit().code(), Some(0));
    }
}

#[tokio::test]
async fn the_loss_of_rank_0_is_named() {
    let model = Model::new();
    let group = model.group(2);
    let mut runners = group.start_all();
    runners[0].signal("KILL");
    let (reason, message, _) = runners[1].failure();
    assert_eq!(reason, "PeerLost");
    assert!(message.contains("rank 0"), "{message}");
    assert_eq!(runners[1].exit().code(), Some(1));
}

#[tokio::test]
async fn all_ranks_name_the_one_that_is_lost() {
    let model = Model::new();
    let group = model.group(4);
    let mut runners = group.start_all();
    // In the middle of an answer, so that MLX's collectives fail as well.
    let mut answer = client(&group).stream(&request("Hello", 2000)).await;
    for _ in 0..5 {
        answer.next().await.unwrap();
    }
    runners[2].signal("KILL");
    for rank in [0, 1, 3] {
        let (reason, message, permanent) = runners[rank].failure();
        assert!(message.contains("rank 2"), "rank {rank}: {message}");
        // Nobody but the one that was killed passes for the cause.
        assert_eq!(reason, "PeerLost", "rank {rank}: {message}");
        assert!(!permanent);
        assert_eq!(runners[rank].exit().code(), Some(1));
    }
}

/// A frozen process keeps its connections: nothing but its silence tells.
#[tokio::test]
async fn a_rank_that_hangs_is_named_by_all() {
    let model = Model::new();
    let mut group = model.group(4);
    group.step_limit_s = 5;
    let mut runners = group.start_all();
    let mut answer = client(&group).stream(&request("Hello", 2000)).await;
    for _ in 0..5 {
        answer.next().await.unwrap();
    }
    runners[2].signal("STOP");
    for (rank, expect) in [(0, "Stalled"), (1, "PeerLost"), (3, "PeerLost")] {
        let (reason, message, permanent) = runners[rank].failure();
        assert!(message.contains("rank 2 does not answer"), "rank {rank}: {message}");
        assert_eq!(reason, expect, "rank {rank}: {message}");
        assert!(!permanent);
    }
}

#[tokio::test]
async fn ranks_of_different_groups_refuse_each_other() {
    let model = Model::new();
    let mut group = model.group(2);
    let mut first = group.start(0);
    group.name = "another group";
    let wrong = group.start(1);
    // It is refused and keeps trying; rank 0 says so and waits on.
    first.wait_for_log("group is group, not another group");
    group.name = "group";
    let mut right = group.start(1);
    first.ready();
    right.ready();
    drop(wrong);
}

#[tokio::test]
async fn bad_weights_end_it_for_good() {
    let model = Model::new();
    model::write(model.path(), &["model.layers.3.mlp.up_proj.weight"]);
    let group = model.group(2);
    let (mut first, mut second) = (group.start(0), group.start(1));
    let (reason, message, permanent) = second.failure();
    assert_eq!((reason.as_str(), permanent), ("BadWeights", true));
    assert!(message.contains("model.layers.3.mlp.up_proj.weight"), "{message}");
    assert_eq!(second.exit().code(), Some(2));
    // Rank 0 has all of its layers, but no peer.
    let (reason, message, permanent) = first.failure();
    assert!(message.contains("rank 1"), "{message}");
    assert_eq!(reason, "PeerLost", "{message}");
    assert!(!permanent);
    assert_eq!(first.exit().code(), Some(1));
}

#[tokio::test]
async fn weights_that_are_no_numbers_end_it_for_good() {
    let model = Model::new();
    let name = "model.layers.2.mlp.up_proj.weight";
    for (largest, expect, text) in [
        (f32::INFINITY, "BadWeights", format!("tensor '{name}' holds NaN or infinity at [0, 0]")),
        // Numbers, but what comes of them is none.
        (f32::MAX, "NotFinite", "hidden states are not finite from layer 2 on".to_owned()),
    ] {
        model::write_with(model.path(), &[], |tensor| if tensor == name { largest } else { 0.3 });
        let group = model.group(1);
        let mut runner = group.start(0);
        let (reason, message, permanent) = runner.failure();
        assert_eq!((reason.as_str(), permanent), (expect, true), "{message}");
        assert!(message.contains(&text), "{message}");
        assert_eq!(runner.exit().code(), Some(2));
    }
}

#[tokio::test]
async fn the_end_of_stdin_ends_a_rank_that_waits() {
    let model = Model::new();
    let group = model.group(2);
    let mut first = group.start(0);
    first.wait_for(|event| matches!(event, RunnerEvent::Phase { .. }));
    first.stdin = None;
    assert_eq!(first.exit().code(), Some(0));
}

/// Asks every `step`th of the questions whose answers are known; all must be right.
async fn ask(world_size: usize, step: usize) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/tiny-model/questions.json");
    let all: Vec<Value> = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    assert!(all.len() >= 100);
    let questions: Vec<_> = all.iter().step_by(step).collect();
    let group = Group::new(world_size, &model::built_in(), model::BUILT_IN_LAYERS);
    let _runners = group.start_all();
    let client = client(&group);
    let answers = futures::stream::iter(&questions).map(async |question| {
        let tools = question.get("tools").cloned().unwrap_or_else(|| json!([]));
        let chat = json!({"messages": question["messages"], "tools": tools});
        let tokens = question["answer_tokens"].as_array().unwrap().len();
        let body = json!({"id": question["id"], "prompt": {"chat": chat},
                          "max_tokens": tokens + 8, "sampling": {"temperature": 0.0}});
        client.whole(&body).await
    });
    let answers: Vec<_> = answers.buffered(4).collect().await;
    for (question, answer) in questions.iter().zip(&answers) {
        assert_eq!(question["answer"], answer.text, "{}", question["id"]);
        assert_eq!(answer.reason, FinishReason::Stop, "{}", question["id"]);
    }
}

#[tokio::test]
async fn the_built_in_model_answers_its_questions() {
    ask(1, 3).await;
}

#[tokio::test]
async fn the_built_in_model_answers_on_two_ranks() {
    ask(2, 9).await;
}
