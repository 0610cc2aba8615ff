//! `model_type` "deepseek_v3": DeepSeek V3, V3.1 and R1; and "kimi_k2", which shares it. Attention over a latent of
//! keys and values (arXiv 2412.19437, section 2.1.1); experts chosen within the best groups, and shared ones.

use std::ops::Range;

use mlx_rs::error::Exception;
use mlx_rs::fast::{ScaledDotProductAttentionMask, rms_norm, scaled_dot_product_attention};
use mlx_rs::ops::indexing::{take_along_axis, topk_axis};
use mlx_rs::ops::{argpartition_axis, concatenate, matmul, sigmoid};
use mlx_rs::transforms::eval;
use mlx_rs::{Array, Dtype};

use super::common::{Common, Defaults};
use super::decoder::SelfAttentionArgs;
use super::fields::{Fields, bad, parts, product};
use super::mlp::{FeedForwardArgs, GATED, MixtureArgs, MlpArgs, Routing as AnyRouting, best};
use super::rope::{Scaling, yarn_magnitude};
use super::{Args, LayerModules};
use crate::batch::{LayerCache, Part};
use crate::config::ConfigError;
use crate::loader::{Kind, Split, Weights};
use crate::mlx::slice;
use crate::nn::{Joint, Linear, Rope, Stack, times};
use crate::tensor::Team;
use crate::timing;

/// Of the norms inside attention, whatever the configuration says of the others.
const LATENT_EPS: f32 = 1e-6;
/// For what many queries need of the heads that are computed together. One head takes more than that where the context
/// is very long; placement counts with both (`exo-plan`, `memory`).
const HEADS_BYTES_MAX: usize = 192 << 20;
/// Scores as they come, with what is hidden, and twice inside attention where it is not one kernel.
const SCORE_COPIES: i32 = 4;

pub(super) struct AttentionArgs {
    heads: i32,
    q_lora_rank: Option<i32>,
    kv_lora_rank: i32,
    rope_dim: i32,
    /// Of queries and keys, without what is rotated.
    nope_dim: i32,
    v_dim: i32,
    bias: bool,
}

/// Experts are chosen by score and bias, within the groups whose two best experts are best; they are weighted by
/// score alone.
#[derive(Clone, Debug)]
pub(super) struct Routing {
    k: i32,
    groups: i32,
    /// Groups that a token may use.
    best_groups: i32,
    scale: f32,
    normalize: bool,
}

pub(super) fn parse(config: Fields<'_>) -> Result<Args, ConfigError> {
    let defaults = Defaults { max_context: 2048, tied: false, theta: 10_000.0 };
    let common = Common { tied: false, ..Common::parse(config, &defaults)? };
    let attention = SelfAttentionArgs::Latent(AttentionArgs::parse(config)?);
    let mlp = MlpArgs { inner: config.size("intermediate_size")?, bias: false };
    // Without experts all layers are dense.
    let count = config.size_if("n_routed_experts")?;
    let mixture = count.map(|count| mixture(config, count)).transpose()?;
    let first = config.count_or("first_k_dense_replace", 0)? as usize;
    let step = config.size_or("moe_layer_freq", 1)? as usize;
    let feed_forward = (0..common.layers).map(|layer| match &mixture {
        Some(mixture) if layer >= first && layer.is_multiple_of(step) => {
            FeedForwardArgs::Mixture(mixture.clone())
        }
        Some(_) | None => FeedForwardArgs::Dense(mlp),
    });
    let feed_forward = feed_forward.collect();
    let extra_layers = config.count_or("num_nextn_predict_layers", 1)? as usize;
    Ok(Args { common, attention, feed_forward, extra_layers })
}

fn mixture(config: Fields<'_>, count: i32) -> Result<MixtureArgs, ConfigError> {
    let count = parts("n_routed_experts", count)?;
    let routing = Routing::parse(config, count)?;
    let inner = config.size("moe_intermediate_size")?;
    let shared = config.size_if("n_shared_experts")?;
    let shared = shared.map(|shared| product("n_shared_experts", [inner, shared])).transpose()?;
    let (path, names, routing) = ("mlp", GATED, AnyRouting::Grouped(routing));
    Ok(MixtureArgs { path, names, count, inner, shared, routing })
}

impl AttentionArgs {
    fn parse(config: Fields<'_>) -> Result<Self, ConfigError> {
        let args = Self {
            heads: config.size("num_attention_heads")?,
            q_lora_rank: config.size_if("q_lora_rank")?,
            kv_lora_rank: config.size("kv_lora_rank")?,
            rope_dim: config.size("qk_rope_head_dim")?,
            nope_dim: config.size("qk_nope_head_dim")?,
            v_dim: config.size("v_head_dim")?,
            bias: config.flag_or("attention_bias", false)?,
        };
        args.check()?;
        Ok(args)
    }

    /// Whether the matrices of all heads can be told by their numbers of rows and columns.
    fn check(&self) -> Result<(), ConfigError> {
        let &Self { heads, kv_lora_rank, rope_dim, nope_dim, v_dim, .. } = self;
        product("qk_nope_head_dim", [heads, nope_dim + rope_dim])?;
        product("v_head_dim", [heads, nope_dim + v_dim])?;
        product("kv_lora_rank", [1, kv_lora_rank + rope_dim]).map(drop)
    }

    pub(super) fn modules(&self, width: i32, out: &mut LayerModules<'_>) {
        let &Self { heads, q_lora_rank, kv_lora_rank, rope_dim, nope_dim, v_dim, bias } = self;
        let what = "attention heads";
        let q_width = heads * (nope_dim + rope_dim);
        let linear = |input, output, bias| Kind::Linear { input, output, bias };
        let by_head = Split::output(heads, what);
        let latent = linear(width, kv_lora_rank + rope_dim, bias);
        let latent = ("self_attn.kv_a_proj_with_mqa", latent, Split::Whole);
        let queries = match q_lora_rank {
            None => ("self_attn.q_proj", linear(width, q_width, false), by_head),
            Some(rank) => ("self_attn.q_a_proj", linear(width, rank, bias), Split::Whole),
        };
        out.add_joint(IN_PROJ, &[queries, latent]);
        if let Some(rank) = q_lora_rank {
            out.add("self_attn.q_b_proj", linear(rank, q_width, false), by_head);
            out.add("self_attn.q_a_layernorm", Kind::Norm { width: rank }, Split::Whole);
        }
        let o_proj = linear(heads * v_dim, width, bias);
        out.add("self_attn.o_proj", o_proj, Split::input(heads, what));
        out.add("self_attn.kv_a_layernorm", Kind::Norm { width: kv_lora_rank }, Split::Whole);
        if out.has("self_attn.kv_b_proj") {
            // As published: keys' and values' halves of each head in one matrix.
            let output = heads * (nope_dim + v_dim);
            let kind = Kind::Linear { input: kv_lora_rank, output, bias: false };
            out.add("self_attn.kv_b_proj", kind, by_head);
        } else {
            let kind = Kind::Stack { count: heads, input: nope_dim, output: kv_lora_rank };
            out.add("self_attn.embed_q", kind, Split::Matrices { what });
            let kind = Kind::Stack { count: heads, input: kv_lora_rank, output: v_dim };
            out.add("self_attn.unembed_out", kind, Split::Matrices { what });
        }
    }
}

/// Name of the joint matrix of all that attention projects its input with.
const IN_PROJ: &str = "self_attn.in_proj";

/// Keys and values of all heads come from one latent per position; only that and a small rotated key are kept.
pub(super) struct Attention {
    /// `q_proj` or `q_a_proj`, and `kv_a_proj_with_mqa`.
    in_proj: Joint,
    /// `q_a_layernorm` and `q_b_proj`, where queries come from a latent of their own.
    q_b_proj: Option<(Array, Linear)>,
    kv_a_layernorm: Array,
    /// Per head `[rank, nope_dim]`: a query into the latent's space, or the other way the latent to a key.
    embed_q: Stack,
    /// Per head `[v_dim, rank]`: the latent to a value.
    unembed_out: Stack,
    o_proj: Linear,
    rope: Rope,
    heads: i32,
    nope_dim: i32,
    rope_dim: i32,
    rank: i32,
    v_dim: i32,
    scale: f32,
    heads_bytes_max: usize,
    team: Team,
}

impl Attention {
    pub(super) fn build(
        args: &AttentionArgs,
        common: &Common,
        path: &str,
        weights: &mut Weights,
        team: &Team,
    ) -> Result<Self, Exception> {
        let path = |name: &str| format!("{path}.self_attn.{name}");
        let heads = team.own(args.heads, false);
        let queries = if args.q_lora_rank.is_some() { "q_a_proj" } else { "q_proj" };
        let parts = [queries, "kv_a_proj_with_mqa"].map(path);
        let in_proj = weights.joint(&path("in_proj"), &parts);
        let q_b_proj = args
            .q_lora_rank
            .map(|_| (weights.norm(&path("q_a_layernorm")), weights.linear(&path("q_b_proj"))));
        let (embed_q, unembed_out) = if weights.has(&path("kv_b_proj")) {
            split_latent(&weights.linear(&path("kv_b_proj")), heads, args)?
        } else {
            (weights.stack(&path("embed_q"))?, weights.stack(&path("unembed_out"))?)
        };
        let mut scale = ((args.nope_dim + args.rope_dim) as f32).powf(-0.5);
        if let Scaling::Yarn { factor, mscale_all_dim, .. } = common.rope.scaling {
            scale *= yarn_magnitude(factor, mscale_all_dim).powi(2);
        }
        Ok(Self {
            in_proj,
            q_b_proj,
            kv_a_layernorm: weights.norm(&path("kv_a_layernorm")),
            embed_q,
            unembed_out,
            o_proj: weights.linear(&path("o_proj")),
            rope: common.rope.build(args.rope_dim, true),
            heads,
            nope_dim: args.nope_dim,
            rope_dim: args.rope_dim,
            rank: args.kv_lora_rank,
            v_dim: args.v_dim,
            scale,
            heads_bytes_max: HEADS_BYTES_MAX,
            team: team.clone(),
        })
    }

    /// `x` `[1, positions, width]` to outputs of the last `wanted` positions; latents are kept of all.
    pub(super) fn forward(
        &self,
        x: &Array,
        wanted: i32,
        cache: &mut LayerCache<'_>,
    ) -> Result<Array, Exception> {
        let (positions, rows) = (x.dim(1), cache.rows());
        let queries = wanted / rows;
        let [q, latent] = self.in_proj.forward_last(x, wanted)?;
        let q = match &self.q_b_proj {
            None => q,
            Some((norm, b)) => b.forward(&rms_norm(&q, Some(norm), LATENT_EPS)?)?,
        };
        let (nope, full) = (self.nope_dim, self.nope_dim + self.rope_dim);
        let q = q.reshape(&[rows, queries, self.heads, full])?.transpose_axes(&[0, 2, 1, 3])?;
        let q_nope = slice(&q, &[0; 4], &[rows, self.heads, queries, nope])?;
        let q_pe = slice(&q, &[0, 0, 0, nope], &[rows, self.heads, queries, full])?;

        let (fed, both) = (positions / rows, self.rank + self.rope_dim);
        let latent = latent.reshape(&[rows, 1, fed, both])?;
        let k_pe = slice(&latent, &[0, 0, 0, self.rank], &[rows, 1, fed, both])?;
        let latent = slice(&latent, &[0; 4], &[rows, 1, fed, self.rank])?;
        let latent = rms_norm(&latent, Some(&self.kv_a_layernorm), LATENT_EPS)?;

        let q_pe = self.rope.forward(&q_pe, &cache.offset(positions - wanted))?;
        let k_pe = self.rope.forward(&k_pe, &cache.offset(0))?;
        let inputs = [q_nope, q_pe, latent, k_pe];
        let output = cache.each(inputs, |[q_nope, q_pe, latent, k_pe], part| {
            let (latent, k_pe) = part.extend(&latent, &k_pe)?;
            self.attend_in_turn(&[q_nope, q_pe, latent, k_pe], part, fed)
        })?;
        let output = output.transpose_axes(&[0, 2, 1, 3])?.reshape(&[1, wanted, -1])?;
        self.o_proj.forward_summed(&output, &self.team)
    }

    /// All heads together; or as many at a time as memory is set aside for: keys, values and scores of a long context
    /// take up far more than the latent does.
    fn attend_in_turn(
        &self,
        inputs: &[Array; 4],
        part: &Part<'_>,
        fed: i32,
    ) -> Result<Array, Exception> {
        let [q_nope, q_pe, latent, k_pe] = inputs;
        let at_once = self.heads_at_once(q_nope, latent, fed);
        if at_once >= self.heads {
            return self.attend(inputs, (&self.embed_q, &self.unembed_out), part, fed);
        }
        let mut outputs = Vec::new();
        for start in (0..self.heads).step_by(at_once as usize) {
            let heads = start..(start + at_once).min(self.heads);
            let (q_nope, q_pe) = (heads_of(q_nope, &heads)?, heads_of(q_pe, &heads)?);
            let inputs = [q_nope, q_pe, latent.clone(), k_pe.clone()];
            let (embed_q, unembed_out) =
                (self.embed_q.part(&heads)?, self.unembed_out.part(&heads)?);
            let output = self.attend(&inputs, (&embed_q, &unembed_out), part, fed)?;
            // Before the next ones are begun, so that their memory is given up.
            timing::wait(|| output.eval())?;
            outputs.push(output);
        }
        concatenate(&outputs, 1)
    }

    fn heads_at_once(&self, q: &Array, latent: &Array, fed: i32) -> i32 {
        let (rows, queries, held) = (q.dim(0), q.dim(2), latent.dim(2));
        if fed == 1 {
            return self.heads;
        }
        let per_position = SCORE_COPIES * queries + self.nope_dim + self.v_dim;
        let bytes = [rows, held, per_position].map(|n| n as usize).iter().product::<usize>();
        let at_once = self.heads_bytes_max / (bytes * q.item_size()).max(1);
        i32::try_from(at_once).unwrap_or(self.heads).clamp(1, self.heads)
    }

    /// `inputs` are queries in two parts, latents and rotated keys; `stacks` are those of the queries' heads.
    ///
    /// One query is taken into the latent's space, which saves making keys and values of all positions; for many
    /// queries making them is cheaper. Both give the same, `[rows, heads, queries, v_dim]`, but round differently in 16
    /// bits: the number of positions that are fed to a row decides, as in mlx-lm, not that of those wanted.
    fn attend(
        &self,
        inputs: &[Array; 4],
        stacks: (&Stack, &Stack),
        part: &Part<'_>,
        fed: i32,
    ) -> Result<Array, Exception> {
        let ([q_nope, q_pe, latent, k_pe], (embed_q, unembed_out)) = (inputs, stacks);
        let scores = matmul(times(q_pe, self.scale)?, k_pe.swap_axes(-1, -2)?)?;
        let scores = part.hide(scores)?;
        let mask = ScaledDotProductAttentionMask::Array(&scores);
        if fed == 1 {
            let q = embed_q.forward(q_nope)?;
            let output = scaled_dot_product_attention(&q, latent, latent, self.scale, mask, None)?;
            unembed_out.forward(&output)
        } else {
            let keys = embed_q.forward_transposed(latent)?;
            let values = unembed_out.forward(latent)?;
            scaled_dot_product_attention(q_nope, &keys, &values, self.scale, mask, None)
        }
    }
}

/// Some of the heads of `[rows, heads, queries, features]`.
fn heads_of(x: &Array, heads: &Range<i32>) -> Result<Array, Exception> {
    slice(x, &[0, heads.start, 0, 0], &[x.dim(0), heads.end, x.dim(2), x.dim(3)])
}

/// The published matrix `[heads · (nope_dim + v_dim), rank]` as `embed_q` and `unembed_out`, packed as it was.
fn split_latent(
    matrix: &Linear,
    heads: i32,
    args: &AttentionArgs,
) -> Result<(Stack, Stack), Exception> {
    let (matrix, packing) = matrix.unpack()?;
    let &AttentionArgs { nope_dim, v_dim, kv_lora_rank: rank, .. } = args;
    let matrix = matrix.reshape(&[heads, nope_dim + v_dim, rank])?;
    let keys = slice(&matrix, &[0; 3], &[heads, nope_dim, rank])?.swap_axes(-1, -2)?;
    let values = slice(&matrix, &[0, nope_dim, 0], &[heads, nope_dim + v_dim, rank])?;
    let embed_q = Stack::pack(keys.contiguous()?, packing)?;
    let unembed_out = Stack::pack(values.contiguous()?, packing)?;
    // Now, so that the published matrix is freed.
    eval(embed_q.arrays().into_iter().chain(unembed_out.arrays()))?;
    Ok((embed_q, unembed_out))
}

impl Routing {
    fn parse(config: Fields<'_>, count: i32) -> Result<Self, ConfigError> {
        for (field, only) in [("topk_method", "noaux_tc"), ("scoring_func", "sigmoid")] {
            if let Some(other) = config.text(field)?.filter(|value| *value != only) {
                return Err(bad(field, format!("'{other}' is not supported")));
            }
        }
        let routing = Self {
            k: config.size_or("num_experts_per_tok", 1)?,
            groups: config.size_or("n_group", 1)?,
            best_groups: config.size_or("topk_group", 1)?,
            scale: config.number_or("routed_scaling_factor", 1.0)?,
            normalize: config.flag_or("norm_topk_prob", true)?,
        };
        let Self { k, groups, best_groups, .. } = routing;
        // A group is judged by its two best experts.
        if count % groups != 0 || (groups > 1 && count / groups < 2) {
            return Err(bad("n_group", format!("{count} experts in {groups} groups")));
        }
        if best_groups > groups {
            return Err(bad("topk_group", format!("{best_groups} of {groups} groups")));
        }
        if k > count / groups * best_groups {
            let reason = format!("{k} of {count} experts in {best_groups} of {groups} groups");
            return Err(bad("num_experts_per_tok", reason));
        }
        Ok(routing)
    }

    /// Experts and weights (float32) of scores `[1, positions, experts]`; `bias` `[experts]`. The experts are the same
    /// on all ranks of `team`.
    pub(super) fn route(
        &self,
        scores: &Array,
        bias: Option<&Array>,
        team: &Team,
    ) -> Result<(Array, Array), Exception> {
        let &Self { k, groups, best_groups, scale, normalize } = self;
        let (positions, count) = (scores.dim(1), scores.dim(2));
        let scores = sigmoid(scores.as_dtype(Dtype::Float32)?)?;
        let mut biased = match bias {
            Some(bias) => scores.add(bias)?,
            None => scores.clone(),
        };
        let dropped = groups - best_groups;
        if dropped > 0 {
            let grouped = biased.reshape(&[1, positions, groups, count / groups])?;
            let judged = topk_axis(&grouped, 2, -1)?.sum_axis(-1, true)?;
            let worst = argpartition_axis(&judged, dropped - 1, -2)?;
            let worst = slice(&worst, &[0; 4], &[1, positions, dropped, 1])?;
            let kept = grouped.put_along_axis(&worst, Array::from_f32(0.0), -2)?;
            biased = kept.reshape(&[1, positions, count])?;
        }
        let experts = team.agreed(best(&biased, k)?)?;
        let mut weights = take_along_axis(&scores, &experts, -1)?;
        if k > 1 && normalize {
            let sum = weights.sum_axis(-1, true)?;
            weights = weights.divide(sum)?;
        }
        Ok((experts, times(&weights, scale)?))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use mlx_rs::random;

    use super::*;
    use crate::batch::Segments;
    use crate::nn::Frequencies;

    const HEADS: i32 = 6;
    const POSITIONS: i32 = 40;

    fn numbers(seed: u64, shape: &[i32]) -> Array {
        random::normal::<f32>(shape, None, None, &random::key(seed).unwrap()).unwrap()
    }

    fn attention(heads_bytes_max: usize) -> Attention {
        let (rank, rope_dim, nope_dim, v_dim, width) = (16, 4, 8, 12, 10);
        let linear = |seed, rows, columns| Linear::dense(&numbers(seed, &[rows, columns]), None);
        let q_rows = HEADS * (nope_dim + rope_dim);
        Attention {
            in_proj: Joint::one(
                linear(1, q_rows + rank + rope_dim, width),
                &[q_rows, rank + rope_dim],
            ),
            q_b_proj: None,
            kv_a_layernorm: numbers(2, &[rank]),
            embed_q: Stack::dense(numbers(3, &[HEADS, rank, nope_dim])).unwrap(),
            unembed_out: Stack::dense(numbers(4, &[HEADS, v_dim, rank])).unwrap(),
            o_proj: linear(5, width, HEADS * v_dim),
            rope: Rope {
                dims: rope_dim,
                traditional: true,
                scale: 1.0,
                magnitude: 1.0,
                frequencies: Frequencies::Base(10_000.0),
            },
            heads: HEADS,
            nope_dim,
            rope_dim,
            rank,
            v_dim,
            scale: 0.3,
            heads_bytes_max,
            team: Team::default(),
        }
    }

    /// Feeds the positions in two parts.
    fn outputs(attention: &Attention) -> Vec<f32> {
        let mut segments = Segments::default();
        segments.open(1, 1);
        let mut values = Vec::new();
        for (seed, positions) in [(6, POSITIONS), (7, POSITIONS / 4)] {
            let x = numbers(seed, &[1, positions, 10]);
            let mut pass = segments.pass(&BTreeSet::from([1]), positions).unwrap();
            let output = attention.forward(&x, positions, &mut pass.layer(0)).unwrap();
            values.extend(output.flatten(None, None).unwrap().to_vec_exact::<f32>().unwrap());
        }
        values
    }

    #[test]
    fn heads_in_turn_give_what_all_together_do() {
        let all = attention(HEADS_BYTES_MAX);
        let latent = Array::zeros::<f32>(&[1, 1, POSITIONS, 16]).unwrap();
        let q = Array::zeros::<f32>(&[1, HEADS, POSITIONS, 8]).unwrap();
        assert_eq!(all.heads_at_once(&q, &latent, POSITIONS), HEADS);
        let head = (POSITIONS * (SCORE_COPIES * POSITIONS + 8 + 12) * 4) as usize;
        for (bytes, expect) in [(0, 1), (4 * head, 4), (100 * head, HEADS)] {
            let some = attention(bytes);
            assert_eq!(some.heads_at_once(&q, &latent, POSITIONS), expect);
            assert_eq!(some.heads_at_once(&q, &latent, 1), HEADS);
            assert_eq!(outputs(&some), outputs(&all));
        }
    }
}
