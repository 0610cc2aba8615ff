//! Chat templates: a conversation to the text that the model was trained on, by Jinja templates
//! with the conventions of Hugging Face's transformers.

use std::{
    collections::BTreeMap,
    error::Error as _,
    fmt,
    path::{Path, PathBuf},
};

use minijinja::{
    Environment, Error, ErrorKind, Value, context,
    syntax::SyntaxConfig,
    value::{Kwargs, ValueKind},
};
use time::{OffsetDateTime, format_description};

use super::{
    TextError,
    json::{to_template, tojson},
    read_optional,
};

/// Name of the template that models with several use when tools are given.
const TOOL_USE: &str = "tool_use";
const DEFAULT: &str = "default";
/// Special tokens that templates may print.
const SPECIAL_TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// A model's chat templates.
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// Names in `environment`, which errors show, by the templates' own names.
    names: BTreeMap<String, String>,
    special_tokens: BTreeMap<String, String>,
}

/// What a template renders.
#[derive(Clone, Copy, Debug)]
pub struct ChatInput<'a> {
    /// OpenAI message objects.
    pub messages: &'a [serde_json::Value],
    /// OpenAI tool objects; none when empty.
    pub tools: &'a [serde_json::Value],
    /// Whether the text ends where the assistant's answer begins.
    pub add_generation_prompt: bool,
    /// Seconds since 1970, for templates that print the date (UTC).
    pub now: i64,
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChatTemplate")
            .field("names", &self.names)
            .field("special_tokens", &self.special_tokens)
            .finish_non_exhaustive()
    }
}

/// The templates' text before it is compiled: name, file, source.
type Sources = Vec<(String, PathBuf, String)>;

impl ChatTemplate {
    /// Reads the templates of the model in `dir`: `chat_template.jinja`, else `chat_template` in
    /// `tokenizer_config.json` (one template or a list of named ones), else `chat_template.json`.
    pub fn load(dir: &Path) -> Result<Self, TextError> {
        let config_path = dir.join("tokenizer_config.json");
        let config = read_json(&config_path)?;
        let mut sources = Sources::new();
        let jinja = dir.join("chat_template.jinja");
        if let Some(bytes) = read_optional(jinja.clone())? {
            let source = String::from_utf8(bytes).map_err(|_| TextError::Invalid {
                path: jinja.clone(),
                message: "not UTF-8".to_owned(),
            })?;
            sources.push((DEFAULT.to_owned(), jinja, source));
        } else if let Some(template) = config.get("chat_template").filter(|t| !t.is_null()) {
            sources = named_sources(template, &config_path)?;
        } else {
            let path = dir.join("chat_template.json");
            if let Some(template) = read_json(&path)?.get("chat_template") {
                sources = named_sources(template, &path)?;
            }
        }
        if sources.is_empty() {
            return Err(TextError::NoTemplate { dir: dir.to_owned() });
        }
        let mut special_tokens = special_tokens(&read_json(&dir.join("special_tokens_map.json"))?);
        special_tokens.extend(self::special_tokens(&config));
        Self::new(&sources, special_tokens)
    }

    fn new(sources: &Sources, special_tokens: BTreeMap<String, String>) -> Result<Self, TextError> {
        let mut environment = environment();
        let mut names = BTreeMap::new();
        for (name, path, source) in sources {
            let file = path.file_name().unwrap_or_default().to_string_lossy();
            let shown = if name == DEFAULT { file.into_owned() } else { format!("{file}, {name}") };
            environment.add_template_owned(shown.clone(), normalized(source)).map_err(|error| {
                TextError::Invalid { path: path.clone(), message: error.to_string() }
            })?;
            names.insert(name.clone(), shown);
        }
        Ok(Self { environment, names, special_tokens })
    }

    /// Renders a conversation. The text carries its special tokens: encode it without adding any.
    pub fn render(&self, input: &ChatInput<'_>) -> Result<String, TextError> {
        let tool_use = self.names.get(TOOL_USE).filter(|_| !input.tools.is_empty());
        let name = tool_use
            .or_else(|| self.names.get(DEFAULT))
            .ok_or_else(|| TextError::Render(format!("there is no template named `{DEFAULT}`")))?;
        let template = (self.environment.get_template(name))
            .map_err(|error| TextError::Render(error.to_string()))?;
        let messages: Value = input.messages.iter().map(message).collect();
        let tools = if input.tools.is_empty() {
            Value::from(())
        } else {
            input.tools.iter().map(to_template).collect()
        };
        let now = input.now;
        let strftime = Value::from_function(move |format: &str| strftime(now, format));
        let special = Value::from_pairs(
            (self.special_tokens.iter()).map(|(name, token)| (name.as_str(), token.as_str())),
        );
        let context = context! {
            messages,
            tools,
            documents => Value::from(()),
            add_generation_prompt => input.add_generation_prompt,
            strftime_now => strftime,
            ..special
        };
        template.render(context).map_err(|error| describe(&error))
    }
}

fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()
        .expect("the default delimiters are valid");
    environment.set_syntax(syntax);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", |value: &Value, args: Kwargs| tojson(value, &args));
    environment.add_test("iterable", is_iterable);
    // In Python what has a length and items is one: texts and mappings as well as lists.
    environment.add_test("sequence", is_iterable);
    environment.add_function("raise_exception", |text: String| {
        Err::<Value, Error>(
            Error::new(ErrorKind::InvalidOperation, text.clone()).with_source(Refusal(text)),
        )
    });
    environment
}

/// Python's `None` can't be iterated over, its undefined values can.
fn is_iterable(value: &Value) -> bool {
    match value.kind() {
        ValueKind::Undefined
        | ValueKind::String
        | ValueKind::Seq
        | ValueKind::Map
        | ValueKind::Iterable => true,
        ValueKind::Plain => value.try_iter().is_ok(),
        _ => false,
    }
}

/// What a template says by `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refusal(String);

fn describe(error: &Error) -> TextError {
    let mut source = error.source();
    while let Some(cause) = source {
        if let Some(Refusal(text)) = cause.downcast_ref() {
            return TextError::Refused(text.clone());
        }
        source = cause.source();
    }
    TextError::Render(error.to_string())
}

/// A message as templates expect it: arguments of tool calls as objects, where clients of OpenAI's
/// API send them as JSON text.
fn message(message: &serde_json::Value) -> Value {
    let mut message = message.clone();
    let calls = message.get_mut("tool_calls").and_then(|c| c.as_array_mut());
    for call in calls.into_iter().flatten() {
        let holder = match call.get("function") {
            Some(_) => call.get_mut("function"),
            None => Some(call),
        };
        let Some(arguments) = holder.and_then(|holder| holder.get_mut("arguments")) else {
            continue;
        };
        let parsed = arguments.as_str().map(serde_json::from_str);
        if let Some(Ok(object @ serde_json::Value::Object(_))) = parsed {
            *arguments = object;
        }
    }
    to_template(&message)
}

/// The source as Python's Jinja with transformers' extension reads it: all line ends are `\n`, and
/// `{% generation %}` … `{% endgeneration %}`, which mark the learned parts in training, only group
/// what is between them. Their effect on white space stays.
fn normalized(source: &str) -> String {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut out = String::with_capacity(source.len());
    let mut rest = source.as_str();
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        let end = tag.find("%}").map_or(tag.len(), |at| at + 2);
        let (tag, after) = tag.split_at(end);
        let name = tag.trim_start_matches("{%").trim_end_matches("%}");
        match name.trim_matches(['-', '+', ' ', '\t', '\n']) {
            "generation" => out.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => out.push_str(&tag.replace("endgeneration", "endif")),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

fn strftime(now: i64, format: &str) -> Result<String, Error> {
    let invalid = |detail: String| Error::new(ErrorKind::InvalidOperation, detail);
    let description = format_description::parse_strftime_owned(format)
        .map_err(|error| invalid(format!("strftime_now({format:?}): {error}")))?;
    OffsetDateTime::from_unix_timestamp(now)
        .map_err(|error| invalid(error.to_string()))?
        .format(&description)
        .map_err(|error| invalid(error.to_string()))
}

/// One template or a list of `{"name", "template"}`.
fn named_sources(template: &serde_json::Value, path: &Path) -> Result<Sources, TextError> {
    let invalid = || TextError::Invalid {
        path: path.to_owned(),
        message: "`chat_template` must be a text or a list of {\"name\", \"template\"}".to_owned(),
    };
    if let Some(source) = template.as_str() {
        let source = source.to_owned();
        return Ok(vec![(DEFAULT.to_owned(), path.to_owned(), source)]);
    }
    let entries = template.as_array().ok_or_else(invalid)?;
    (entries.iter())
        .map(|entry| {
            let text = |key| entry.get(key).and_then(|v| v.as_str()).map(str::to_owned);
            match (text("name"), text("template")) {
                (Some(name), Some(source)) => Ok((name, path.to_owned(), source)),
                _ => Err(invalid()),
            }
        })
        .collect()
}

/// The special tokens that a config names, as texts or as objects with `content`.
fn special_tokens(config: &serde_json::Value) -> BTreeMap<String, String> {
    let text = |name: &str| {
        let value = config.get(name)?;
        value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
    };
    (SPECIAL_TOKENS.iter()).filter_map(|name| Some(((*name).to_owned(), text(name)?))).collect()
}

/// The file's object; an empty one when there is no such file.
fn read_json(path: &Path) -> Result<serde_json::Value, TextError> {
    match read_optional(path.to_owned())? {
        Some(bytes) => serde_json::from_slice(&bytes)
            .map_err(|source| TextError::Json { path: path.to_owned(), source }),
        None => Ok(serde_json::json!({})),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn template(source: &str) -> ChatTemplate {
        let sources = vec![(DEFAULT.to_owned(), PathBuf::from("t"), source.to_owned())];
        let special =
            special_tokens(&json!({"bos_token": "<s>", "eos_token": {"content": "</s>"}}));
        ChatTemplate::new(&sources, special).unwrap()
    }

    fn render(
        source: &str,
        messages: &[serde_json::Value],
        tools: &[serde_json::Value],
    ) -> Result<String, TextError> {
        template(source).render(&ChatInput {
            messages,
            tools,
            add_generation_prompt: true,
            now: 1_785_000_000, // 2026-07-25 17:20 UTC
        })
    }

    fn chat() -> Vec<serde_json::Value> {
        vec![
            json!({"role": "system", "content": " Be brief. "}),
            json!({"role": "user", "content": "Hi <b>&'"}),
        ]
    }

    /// Header tags around each turn, a date, trimming, tools printed with an indent.
    const HEADERS: &str = "\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now('%d %b %Y') %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- '<|h|>system<|/h|>\\n\\nToday: ' + date_string + '\\n' }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- '\\n' }}
    {%- endfor %}
{%- endif %}
{{- system + eos_token }}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|h|>' + message['role'] + '<|/h|>\\n\\n' + message['content'] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|h|>assistant<|/h|>\\n\\n' }}
{%- endif %}
";

    #[test]
    fn headers_in_the_manner_of_llama() {
        assert_eq!(
            render(HEADERS, &chat(), &[]).unwrap(),
            "<s><|h|>system<|/h|>\n\nToday: 25 Jul 2026\nBe brief.</s>\
             <|h|>user<|/h|>\n\nHi <b>&'</s><|h|>assistant<|/h|>\n\n"
        );
        let with_tool = render(HEADERS, &chat(), &[json!({"name": "f"})]).unwrap();
        assert!(with_tool.contains("{\n    \"name\": \"f\"\n}\n"), "{with_tool}");
    }

    /// Namespace, reversed search, string methods, loop controls, tool calls.
    const CHATML: &str = "\
{%- set ns = namespace(last=-1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == 'user' and message.content is string %}
        {%- set ns.last = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{%- continue %}{%- endif %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role }}{{- '!' if loop.index0 == ns.last }}
    {{- '\\n' + content }}
    {%- for call in message.tool_calls or [] %}
        {%- set call = call.function if call.function is defined else call %}
        {{- '\\n<tool_call>\\n{\"name\": \"' ~ call.name ~ '\", \"arguments\": ' }}
        {{- call.arguments if call.arguments is string else call.arguments | tojson }}
        {{- '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- 'no' }}{%- endif %}
{%- endif %}";

    #[test]
    fn turns_in_the_manner_of_qwen() {
        let mut messages = chat();
        messages.push(json!({"role": "assistant", "content": "<think>x</think>\n\nOk"}));
        messages.push(json!({"role": "assistant", "content": null, "tool_calls": [
            {"type": "function", "function": {"name": "f", "arguments": "{\"a\":[1,2]}"}},
        ]}));
        assert_eq!(
            render(CHATML, &messages, &[]).unwrap(),
            "<|im_start|>user!\nHi <b>&'<|im_end|>\n\
             <|im_start|>assistant\nOk<|im_end|>\n\
             <|im_start|>assistant\n\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": [1, 2]}}\n\
             </tool_call><|im_end|>\n<|im_start|>assistant\n"
        );
    }

    /// Alternation enforced, brackets, a filter by attribute, a plain block with trimmed lines.
    const BRACKETS: &str = "\
{% set turns = messages | selectattr('role', 'ne', 'system') | list %}
{% for message in turns %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% if message['role'] == 'user' %}
[INST] {{ message['content'].strip() }} [/INST]
    {% else %}
{% generation %}
{{ message['content'] + eos_token }}
{% endgeneration %}
    {% endif %}
{% endfor %}
";

    #[test]
    fn brackets_in_the_manner_of_mistral() {
        let mut messages = chat();
        messages.push(json!({"role": "assistant", "content": "Ok"}));
        assert_eq!(render(BRACKETS, &messages, &[]).unwrap(), "[INST] Hi <b>&' [/INST]\nOk</s>\n");
        messages.push(json!({"role": "assistant", "content": "again"}));
        let refused = render(BRACKETS, &messages, &[]).unwrap_err();
        assert!(matches!(refused, TextError::Refused(_)), "{refused:?}");
        assert_eq!(refused.to_string(), "Roles must alternate user/assistant/user/assistant/...");
    }

    #[test]
    fn values_print_as_in_python() {
        let out = render("{{ true }} {{ none }} {{ [1, 'a'] }} {{ 1.0 }}", &[], &[]).unwrap();
        assert_eq!(out, "True None [1, 'a'] 1.0");
    }

    #[test]
    fn failures_say_where() {
        let failed = render("a\n{{ messages[0].content.nothing.more }}", &chat(), &[]);
        let text = failed.unwrap_err().to_string();
        assert!(text.contains("(in t:2)"), "{text}");
    }

    #[test]
    fn tests_and_line_ends_are_pythons() {
        let source = "{{ none is iterable }} {{ x is iterable }} {{ 'a' is sequence }}\r\n\
                      {{ {} is iterable }} {{ 1 is sequence }} {{ [] is sequence }}\r\n";
        let out = render(source, &[], &[]).unwrap();
        assert_eq!(out, "False True True\nTrue False True");
    }

    #[test]
    fn files_are_found_and_bad_ones_named() {
        let dir = tempfile::tempdir().unwrap();
        let load = || ChatTemplate::load(dir.path());
        let input =
            |tools| ChatInput { messages: &[], tools, add_generation_prompt: false, now: 0 };
        assert!(matches!(load(), Err(TextError::NoTemplate { .. })));
        let config = dir.path().join("tokenizer_config.json");
        let named = json!({"bos_token": "B", "chat_template": [
            {"name": "default", "template": "d{{ bos_token }}"},
            {"name": "tool_use", "template": "t{{ tools[0].x }}"},
        ]});
        std::fs::write(&config, named.to_string()).unwrap();
        let templates = load().unwrap();
        assert_eq!(templates.render(&input(&[])).unwrap(), "dB");
        let tools = [json!({"x": 1})];
        assert_eq!(templates.render(&input(&tools)).unwrap(), "t1");
        // The file of its own goes first.
        let jinja = dir.path().join("chat_template.jinja");
        std::fs::write(&jinja, "j{{ bos_token }}\n").unwrap();
        assert_eq!(load().unwrap().render(&input(&[])).unwrap(), "jB");
        std::fs::write(&jinja, "{% if %}").unwrap();
        let bad = load().unwrap_err().to_string();
        assert!(bad.contains("chat_template.jinja: syntax error"), "{bad}");
        std::fs::write(&config, "{").unwrap();
        let bad = load().unwrap_err().to_string();
        assert!(bad.contains("tokenizer_config.json"), "{bad}");
    }
}
