//! Sequences that are decoded together draw the same tokens as alone, whenever they come and go.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;

use common::{LAYERS, Tensor, VOCAB, config, tensors, write};
use exo_engine::{Engine, EngineError, Feed, LoadConfig, Opening, Sampling, Sharding, Step};
use serde_json::{Value, json};
use tempfile::TempDir;

fn load(config: &Value, tensors: &[Tensor]) -> (TempDir, Engine) {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), config, tensors);
    let load = LoadConfig {
        model_dir: dir.path().to_owned(),
        layers: 0..config["num_hidden_layers"].as_u64().unwrap() as usize,
        sharding: Sharding::Pipeline,
        group: None,
        context_length: 600,
    };
    let engine = Engine::load(&load, &mut |_| {}).unwrap();
    (dir, engine)
}

fn llama() -> (TempDir, Engine) {
    load(&config(), &tensors())
}

/// Attention over a latent, without experts.
fn deepseek() -> (TempDir, Engine) {
    let mut config = config();
    for (field, value) in [
        ("model_type", json!("deepseek_v3")),
        ("kv_lora_rank", json!(16)),
        ("qk_rope_head_dim", json!(8)),
        ("qk_nope_head_dim", json!(8)),
        ("v_head_dim", json!(8)),
    ] {
        config[field] = value;
    }
    let mut all = tensors();
    all.retain(|t| !["k_proj", "v_proj"].iter().any(|name| t.name.contains(name)));
    let mut state = 1_u32;
    for layer in 0..LAYERS {
        let attention = format!("model.layers.{layer}.self_attn");
        all.retain(|t| t.name != format!("{attention}.q_proj.weight"));
        for (name, shape) in [
            ("q_proj", vec![4 * 16, 32]),
            ("kv_a_proj_with_mqa", vec![16 + 8, 32]),
            ("kv_a_layernorm", vec![16]),
            ("kv_b_proj", vec![4 * 16, 16]),
        ] {
            let count: usize = shape.iter().product();
            let mut value = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            };
            let values = (0..count).map(|_| 0.4 * value()).collect();
            all.push(Tensor { name: format!("{attention}.{name}.weight"), shape, values });
        }
    }
    load(&config, &all)
}

/// A request of a client that comes at `from`, in steps of all.
struct Request {
    prompt: Vec<u32>,
    sampling: Sampling,
    answer: usize,
    from: usize,
}

fn requests() -> Vec<Request> {
    let chance = Sampling { temperature: 1.0, seed: 5, ..Sampling::greedy() };
    let samplings = [
        Sampling::greedy(),
        Sampling { top_p: 0.9, ..chance.clone() },
        Sampling { top_k: 9, seed: 6, logprobs: Some(3), ..chance.clone() },
        Sampling {
            repetition_penalty: 1.3,
            presence_penalty: 0.4,
            frequency_penalty: 0.2,
            logit_bias: vec![(7, 1.5)],
            ..chance.clone()
        },
        Sampling { frequency_penalty: 1.0, ..Sampling::greedy() },
        Sampling { min_p: 0.1, seed: 9, ..chance },
    ];
    let shapes = [(3, 60, 0), (50, 20, 0), (300, 40, 4), (5, 90, 10), (280, 7, 12), (1, 30, 12)];
    (samplings.into_iter().zip(shapes))
        .map(|(sampling, (prompt, answer, from))| Request {
            prompt: (0..prompt).map(|i| ((i * 7 + prompt) % VOCAB) as u32).collect(),
            sampling,
            answer,
            from,
        })
        .collect()
}

/// Every second one says where it ends.
fn begin(engine: &mut Engine, seq: u64, request: &Request) -> u32 {
    let last_draw = if seq.is_multiple_of(2) { request.answer as u64 - 1 } else { u64::MAX };
    engine.open(seq, &Opening { last_draw, ..request.sampling.clone().into() });
    let tokens = request.prompt.clone();
    let step = Step::Prefill { seq, tokens, sample: true, draw: 0 };
    engine.step(&step).unwrap().unwrap().token
}

fn alone(engine: &mut Engine, request: &Request) -> Vec<u32> {
    let mut tokens = vec![begin(engine, 99, request)];
    while tokens.len() < request.answer {
        let (token, draw) = (*tokens.last().unwrap(), tokens.len() as u64);
        let step = Step::Decode { seq: 99, token, draw };
        tokens.push(engine.step(&step).unwrap().unwrap().token);
    }
    engine.close(99);
    tokens
}

fn together(engine: &mut Engine, requests: &[Request]) -> Vec<Vec<u32>> {
    let mut answers: BTreeMap<u64, Vec<u32>> = BTreeMap::new();
    for step in 0.. {
        for (seq, request) in (0..).zip(requests).filter(|(_, r)| r.from == step) {
            let first = begin(engine, seq, request);
            answers.insert(seq, vec![first]);
        }
        // The newest first: the order of the feeds is the caller's choice.
        let feeds: Vec<Feed> = (answers.iter().rev())
            .filter(|(seq, tokens)| tokens.len() < requests[**seq as usize].answer)
            .map(|(&seq, t)| Feed { seq, token: *t.last().unwrap(), draw: t.len() as u64 })
            .collect();
        if feeds.is_empty() {
            break;
        }
        let outputs = engine.decode(&feeds).unwrap();
        assert_eq!(outputs.len(), feeds.len());
        for (feed, output) in feeds.iter().zip(outputs) {
            let wanted = requests[feed.seq as usize].sampling.logprobs;
            assert_eq!(output.logprob.is_some(), wanted.is_some());
            assert_eq!(output.top.len(), wanted.unwrap_or(0) as usize);
            let answer = answers.get_mut(&feed.seq).unwrap();
            answer.push(output.token);
            if answer.len() == requests[feed.seq as usize].answer {
                engine.close(feed.seq);
            }
        }
    }
    answers.into_values().collect()
}

fn check(engine: &mut Engine) {
    let requests = requests();
    let expect: Vec<Vec<u32>> = requests.iter().map(|r| alone(engine, r)).collect();
    assert_eq!(together(engine, &requests), expect);
    assert_eq!(together(engine, &requests), expect);
}

#[test]
fn rows_that_come_and_go_draw_as_if_alone() {
    check(&mut llama().1);
}

#[test]
fn so_do_rows_with_latent_attention() {
    check(&mut deepseek().1);
}

#[test]
fn a_row_may_be_left_out_fed_otherwise_or_opened_anew() {
    let (_dir, mut engine) = llama();
    let requests = requests();
    let expect: Vec<Vec<u32>> = requests.iter().map(|r| alone(&mut engine, r)).collect();
    let mut answers: Vec<Vec<u32>> =
        (0..).zip(&requests).map(|(seq, r)| vec![begin(&mut engine, seq, r)]).collect();
    let feed = |seq: usize, answers: &[Vec<u32>]| Feed {
        seq: seq as u64,
        token: *answers[seq].last().unwrap(),
        draw: answers[seq].len() as u64,
    };
    // Row 1 pauses in every third step, row 3 is opened anew in the middle.
    for step in 0..18 {
        let rows: Vec<usize> = (0..4).filter(|row| *row != 1 || step % 3 != 0).collect();
        let feeds: Vec<Feed> = rows.iter().map(|row| feed(*row, &answers)).collect();
        for (row, output) in rows.iter().zip(engine.decode(&feeds).unwrap()) {
            answers[*row].push(output.token);
        }
        if step == 9 {
            let Request { prompt, sampling, .. } = &requests[3];
            let opening = Opening { prompt: Some(prompt.len()), ..sampling.clone().into() };
            engine.open(3, &opening);
            let tokens = [prompt.as_slice(), &answers[3]].concat();
            let draw = answers[3].len() as u64;
            let again = Step::Prefill { seq: 3, tokens, sample: true, draw };
            let token = engine.step(&again).unwrap().unwrap().token;
            answers[3].push(token);
        }
    }
    for row in 0..4 {
        assert_eq!(answers[row], expect[row][..answers[row].len()], "row {row}");
    }
    // A token that was not drawn: the answer is that of a prompt that has it.
    let other = (answers[0].last().unwrap() + 1) % VOCAB as u32;
    let mut feeds = [feed(0, &answers), feed(2, &answers)];
    feeds[0].token = other;
    let drawn = engine.decode(&feeds).unwrap();
    assert_eq!(drawn[1].token, expect[2][answers[2].len()]);
    let (before, prompt) = (answers[0].len() - 1, &requests[0].prompt);
    let changed = [prompt.as_slice(), &answers[0][..before], &[other]].concat();
    engine.open(50, &requests[0].sampling.clone().into());
    let draw = before as u64 + 1;
    let step = Step::Prefill { seq: 50, tokens: changed, sample: true, draw };
    assert_eq!(drawn[0].token, engine.step(&step).unwrap().unwrap().token);
}

#[test]
fn bad_batches_change_nothing() {
    let (_dir, mut engine) = llama();
    let requests = requests();
    let expect = alone(&mut engine, &requests[0]);
    let token = begin(&mut engine, 0, &requests[0]);
    // Behind the first step another was begun ahead.
    let token = engine.decode(&[Feed { seq: 0, token, draw: 1 }]).unwrap()[0].token;
    let good = Feed { seq: 0, token, draw: 2 };
    for (feeds, expect) in [
        (vec![], EngineError::NoTokens.to_string()),
        (vec![good, good], EngineError::FedTwice(0).to_string()),
        (vec![good, Feed { seq: 4, ..good }], EngineError::UnknownSequence(4).to_string()),
        (
            vec![Feed { token: VOCAB as u32, ..good }],
            EngineError::Token { token: VOCAB as u32, vocab_size: VOCAB }.to_string(),
        ),
    ] {
        assert_eq!(engine.decode(&feeds).unwrap_err().to_string(), expect);
    }
    assert_eq!(engine.decode(&[good]).unwrap()[0].token, expect[2]);
}

#[test]
fn a_penalty_keeps_a_greedy_answer_from_repeating_itself() {
    let (_dir, mut engine) = llama();
    let request = |penalty: f32| Request {
        prompt: vec![3, 4, 5],
        sampling: Sampling { presence_penalty: penalty, ..Sampling::greedy() },
        answer: 40,
        from: 0,
    };
    let kinds = |mut tokens: Vec<u32>| {
        tokens.sort_unstable();
        tokens.dedup();
        tokens.len()
    };
    // Far above the differences of this model's logits.
    assert_eq!(kinds(alone(&mut engine, &request(100.0))), 40);
    assert!(kinds(alone(&mut engine, &request(0.0))) < 40);
    let biased = Sampling { logit_bias: vec![(9, 100.0)], ..Sampling::greedy() };
    let biased = Request { sampling: biased, ..request(0.0) };
    assert_eq!(alone(&mut engine, &biased), [9; 40]);
}
