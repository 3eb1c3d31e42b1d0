//! Options of reading data files.

use clap::Args;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// How the rows of data files are read.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RowOptions {
    /// Columns that the files have under other names: prompt=question,answer=response
    #[arg(long, value_name = "KEY=COLUMN", value_delimiter = ',')]
    #[serde(
        serialize_with = "write_columns",
        deserialize_with = "read_columns",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub columns: Vec<Column>,
    /// Key that holds the list of rows, in files that are one JSON object: {"data": […]}
    #[arg(long, value_name = "KEY")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    /// Leave out rows that cannot be read, and say how many
    #[arg(long)]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub skip_bad_rows: bool,
}

impl RowOptions {
    /// Whether all options have their defaults.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// A column under another name: `prompt=question` reads the column `question` as the key `prompt`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Column {
    /// The key that swat knows.
    pub key: String,
    /// The column's name in the file.
    pub column: String,
}

impl FromStr for Column {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((key, column)) if !key.trim().is_empty() && !column.is_empty() => {
                Ok(Self { key: key.trim().to_owned(), column: column.to_owned() })
            }
            _ => Err("expected KEY=COLUMN, such as prompt=question".into()),
        }
    }
}

impl fmt::Display for Column {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.key, self.column)
    }
}

/// As a list of `key=column`.
pub(crate) fn write_columns<S: Serializer>(columns: &[Column], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(columns.iter().map(Column::to_string))
}

/// From a table of keys and columns, a list of `key=column`, or the text of the command line.
pub(crate) fn read_columns<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Column>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "a table of keys and columns, such as { prompt = \"question\" }")]
    enum Columns {
        Table(BTreeMap<String, String>),
        List(Vec<String>),
        Text(String),
    }
    let parse = |text: &str| text.parse().map_err(serde::de::Error::custom);
    match Columns::deserialize(deserializer)? {
        Columns::Table(table) => Ok(table.into_iter().map(|(key, column)| Column { key, column }).collect()),
        Columns::List(list) => list.iter().map(|text| parse(text)).collect(),
        Columns::Text(text) => text.split(',').map(parse).collect(),
    }
}
