//! The frame that all architectures share: embedding, layers of attention and feed-forward with a norm before each,
//! final norm and output projection.

use std::collections::BTreeSet;

use mlx_rs::error::Exception;
use mlx_rs::transforms::eval;
use mlx_rs::{Array, Dtype};

use super::attention::{Attention, AttentionArgs};
use super::common::Common;
use super::deepseek_v3;
use super::mlp::FeedForward;
use super::single::{Parts, Steps};
use super::{Args, LayerModules, Part, layer_path};
use crate::batch::{LayerCache, Pass, Place, Segments};
use crate::loader::{Home, Kind, Module, Split, Weights};
use crate::mlx::{Traced, add, rms_norm};
use crate::nn::{Embedding, Linear, last};
use crate::tensor::Team;

/// Positions on which a step is tried, and those before them.
const TRIED: i32 = 2;
const TRIED_BEHIND: i32 = 5;
/// How far it may be off: as part of the largest number, a few times what rounding to 16 bit does, and as part of what
/// the layer changes.
const TRIED_ROUNDING: f32 = 0.02;
const TRIED_OFF_MAX: f32 = 0.05;

const NORMS: [&str; 2] = ["input_layernorm", "post_attention_layernorm"];

/// Every module of the whole model. `has` says whether the checkpoint has a tensor.
pub(super) fn modules(args: &Args, has: &dyn Fn(&str) -> bool) -> Vec<Module> {
    let Common { width, vocab_size, tied, .. } = args.common;
    let mut list = Vec::new();
    let mut add = |path: &str, kind, home| {
        list.push(Module::new(path.to_owned(), kind, home, Split::Whole));
    };
    let home = if tied { Home::Ends } else { Home::First };
    add("model.embed_tokens", Kind::Embedding { rows: vocab_size, width }, home);
    add("model.norm", Kind::Norm { width }, Home::Last);
    if !tied {
        let kind = Kind::Linear { input: width, output: vocab_size, bias: false };
        add("lm_head", kind, Home::Last);
    }
    for (layer, feed_forward) in args.feed_forward.iter().enumerate() {
        let mut out = LayerModules { layer, has, list: &mut list };
        for name in NORMS {
            out.add(name, Kind::Norm { width }, Split::Whole);
        }
        match &args.attention {
            SelfAttentionArgs::Grouped(attention) => attention.modules(width, &mut out),
            SelfAttentionArgs::Latent(attention) => attention.modules(width, &mut out),
        }
        feed_forward.modules(width, &mut out);
    }
    list
}

pub(super) enum SelfAttentionArgs {
    Grouped(AttentionArgs),
    Latent(deepseek_v3::AttentionArgs),
}

enum SelfAttention {
    Grouped(Attention),
    Latent(deepseek_v3::Attention),
}

struct Block {
    self_attn: SelfAttention,
    feed_forward: FeedForward,
    input_layernorm: Array,
    post_attention_layernorm: Array,
    eps: f32,
    team: Team,
    /// For one position of a single sequence, where that has kernels of its own.
    step: Option<Traced>,
}

impl Block {
    fn build(
        args: &Args,
        layer: usize,
        weights: &mut Weights,
        team: &Team,
    ) -> Result<Self, Exception> {
        let (path, common) = (layer_path(layer), &args.common);
        let [input_layernorm, post_attention_layernorm] =
            NORMS.map(|name| weights.norm(&format!("{path}.{name}")));
        let self_attn = match &args.attention {
            SelfAttentionArgs::Grouped(attention) => {
                SelfAttention::Grouped(Attention::build(attention, common, &path, weights, team))
            }
            SelfAttentionArgs::Latent(attention) => SelfAttention::Latent(
                deepseek_v3::Attention::build(attention, common, &path, weights, team)?,
            ),
        };
        let feed_forward = args.feed_forward[layer].build(&path, weights)?;
        let (eps, team) = (common.eps, team.clone());
        Ok(Self {
            self_attn,
            feed_forward,
            input_layernorm,
            post_attention_layernorm,
            eps,
            team,
            step: None,
        })
    }

    /// What does one position of a single sequence in few kernels, if that can be.
    fn make_step(&self, steps: &Steps) -> Result<Option<Traced>, Exception> {
        let (SelfAttention::Grouped(attention), Some((gate_up_proj, down_proj))) =
            (&self.self_attn, self.feed_forward.dense())
        else {
            return Ok(None);
        };
        let Some(attention) = attention.single().filter(|_| self.team.is_alone()) else {
            return Ok(None);
        };
        steps.layer(Parts {
            input_norm: &self.input_layernorm,
            attention,
            post_norm: &self.post_attention_layernorm,
            gate_up_proj,
            down_proj,
            eps: self.eps,
        })
    }

    /// Whether `step` gives what the layer's operations do, but for rounding: on some positions behind others, so that
    /// rotation and caches count.
    fn agrees(&self, step: &Traced) -> Result<bool, Exception> {
        let width = self.input_layernorm.dim(0);
        let hidden = |first: i32, positions: i32| {
            let count = positions * width;
            let values: Vec<f32> = (0..count).map(|i| ((first + i) as f32 * 0.7).sin()).collect();
            Array::from_slice(&values, &[1, positions, width])
                .as_dtype(self.input_layernorm.dtype())
        };
        let row = BTreeSet::from([0]);
        let mut caches = [Segments::default(), Segments::default()];
        for segments in &mut caches {
            segments.open(0, 1);
            let x = hidden(0, TRIED_BEHIND)?;
            self.forward(&x, TRIED_BEHIND, &mut segments.pass(&row, TRIED_BEHIND)?.layer(0))?
                .eval()?;
        }
        let [by_operations, by_step] = &mut caches;
        for number in 1..=TRIED {
            let x = hidden(1000 * number, 1)?;
            let expected = self.forward(&x, 1, &mut by_operations.pass(&row, 1)?.layer(0))?;
            let mut pass = by_step.pass(&row, 1)?;
            let mut cache = pass.layer(0);
            let Some(Place { position, keys, values }) = cache.next_place(x.dtype()) else {
                return Ok(false);
            };
            let found = step.apply([&x, position, keys, values])?;
            let largest = |x: &Array| x.as_dtype(Dtype::Float32)?.abs()?.max(None);
            let off = largest(&found.subtract(&expected)?)?;
            let (size, change) = (largest(&expected)?, largest(&expected.subtract(&x)?)?);
            // Kernels that can't be compiled fail here.
            eval([&off, &size, &change])?;
            let [off, size, change] = [off, size, change].map(|x| x.item_exact::<f32>());
            // Not so where one is not a number.
            let agrees = off <= size * TRIED_ROUNDING + change * TRIED_OFF_MAX;
            if !agrees {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// `x` `[1, positions, width]` to the last `wanted` positions; the cache gets all.
    fn forward(
        &self,
        x: &Array,
        wanted: i32,
        cache: &mut LayerCache<'_>,
    ) -> Result<Array, Exception> {
        let is_single = x.dim(1) == 1 && x.dtype() == self.input_layernorm.dtype();
        if let Some(step) = self.step.as_ref().filter(|_| is_single)
            && let Some(Place { position, keys, values }) = cache.next_place(x.dtype())
        {
            return step.apply([x, position, keys, values]);
        }
        let normed = rms_norm(x, Some(&self.input_layernorm), self.eps)?;
        let attended = match &self.self_attn {
            SelfAttention::Grouped(attention) => attention.forward(&normed, wanted, cache)?,
            SelfAttention::Latent(attention) => attention.forward(&normed, wanted, cache)?,
        };
        let x = add(&last(x, wanted)?, &attended)?;
        let normed = rms_norm(&x, Some(&self.post_attention_layernorm), self.eps)?;
        add(&x, &self.feed_forward.forward(&normed, &self.team)?)
    }
}

/// Gives all layers their steps if the first one's does here what it should: kernels are compiled on the machine, and
/// for GPUs that nobody has tried.
fn give_steps(layers: &mut [Block], steps: &Steps) -> Result<(), Exception> {
    let Some(first) = layers.first() else { return Ok(()) };
    match first.make_step(steps)? {
        Some(step) if first.agrees(&step).unwrap_or(false) => {}
        Some(_) | None => return Ok(()),
    }
    for layer in layers {
        layer.step = layer.make_step(steps)?;
    }
    Ok(())
}

enum Head {
    Own(Linear),
    /// The embedding serves as output projection.
    Tied,
}

/// One rank's part of a model. Arrays are `[1, positions, features]`.
pub(crate) struct Model {
    embed_tokens: Option<Embedding>,
    layers: Vec<Block>,
    /// Norm and output projection; last rank only.
    head: Option<(Array, Head)>,
    eps: f32,
}

impl Model {
    pub(super) fn build(
        args: &Args,
        part: &Part,
        team: &Team,
        mut weights: Weights,
    ) -> Result<Self, Exception> {
        let common = &args.common;
        let embeds = part.owns(if common.tied { Home::Ends } else { Home::First });
        let embed_tokens = embeds.then(|| weights.embedding("model.embed_tokens"));
        let layers: Result<Vec<Block>, Exception> =
            part.layers.clone().map(|i| Block::build(args, i, &mut weights, team)).collect();
        let mut layers = layers?;
        if let Some(steps) = Steps::new(common.eps)? {
            give_steps(&mut layers, &steps)?;
        }
        let head = part.last.then(|| {
            let tied = common.tied;
            let head = if tied { Head::Tied } else { Head::Own(weights.linear("lm_head")) };
            (weights.norm("model.norm"), head)
        });
        weights.finish();
        Ok(Self { embed_tokens, layers, head, eps: common.eps })
    }

    /// Token ids `[1, positions]` to hidden states. First rank only.
    pub(crate) fn embed(&self, tokens: &Array) -> Result<Array, Exception> {
        self.embed_tokens.as_ref().expect("called on the first rank").forward(tokens)
    }

    /// Hidden states through this rank's layers; the result is that of the last `wanted` positions. Where `pass` feeds
    /// several sequences, each has one of the positions and all are wanted.
    pub(crate) fn forward(
        &self,
        mut x: Array,
        wanted: i32,
        pass: &mut Pass<'_>,
    ) -> Result<Array, Exception> {
        assert_eq!(self.layers.len(), pass.layers(), "one cache per layer");
        let count = self.layers.len();
        for (i, layer) in self.layers.iter().enumerate() {
            // Later layers attend to every position; behind the last one only those that are wanted matter.
            let wanted = if i + 1 == count { wanted } else { x.dim(1) };
            x = layer.forward(&x, wanted, &mut pass.layer(i))?;
        }
        Ok(x)
    }

    /// Hidden states to logits. Last rank only.
    pub(crate) fn head(&self, x: &Array) -> Result<Array, Exception> {
        let (norm, head) = self.head.as_ref().expect("called on the last rank");
        let x = rms_norm(x, Some(norm), self.eps)?;
        match (head, &self.embed_tokens) {
            (Head::Own(linear), _) => linear.forward(&x),
            (Head::Tied, Some(embedding)) => embedding.as_linear(&x),
            (Head::Tied, None) => unreachable!("a tied embedding is at both ends"),
        }
    }
}
