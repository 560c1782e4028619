//! Types and values. The tables know `TEXT`, `BIGINT` and `BOOLEAN`; so do arguments and results.
//!
//! Levelled here: PostgreSQL gives `int4` for a literal and `numeric` for a sum of `BIGINT`, SQLite integers for truth
//! values. All are read as what the Rust type says.

use std::{borrow::Cow, fmt};

use sqlx::{
    Arguments as _, Decode, Encode, Postgres, Type, TypeInfo as _, ValueRef as _,
    encode::IsNull,
    error::BoxDynError,
    postgres::{PgArguments, PgTypeInfo, PgValue, PgValueFormat, PgValueRef},
};

use super::Mote;

/// The kinds of arguments, and of SQLite's values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `BOOLEAN`.
    Bool,
    /// `BIGINT`.
    Int,
    /// `TEXT`.
    Text,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Bool => "BOOLEAN",
            Self::Int => "BIGINT",
            Self::Text => "TEXT",
        }
    }
}

/// A type, as a database or as Rust names it.
#[derive(Debug, Clone, PartialEq)]
pub enum TypeInfo {
    /// Of a Rust value, or a value of SQLite (which has no truth values of its own).
    Kind(Kind),
    /// Of NULL.
    Null,
    /// A type of SQLite that the tables don't have.
    Other(&'static str),
    /// Of a value of PostgreSQL.
    Postgres(PgTypeInfo),
}

impl fmt::Display for TypeInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(sqlx::TypeInfo::name(self))
    }
}

impl sqlx::TypeInfo for TypeInfo {
    fn is_null(&self) -> bool {
        match self {
            Self::Kind(_) | Self::Other(_) => false,
            Self::Null => true,
            Self::Postgres(info) => info.is_null(),
        }
    }

    fn name(&self) -> &str {
        match self {
            Self::Kind(kind) => kind.name(),
            Self::Null => "NULL",
            Self::Other(name) => name,
            Self::Postgres(info) => info.name(),
        }
    }
}

/// An owned value.
pub enum Value {
    /// Of SQLite.
    Sqlite(SqliteValue),
    /// Of PostgreSQL.
    Postgres(PgValue),
}

/// A value in its row.
pub enum ValueRef<'r> {
    /// Of SQLite.
    Sqlite(SqliteValueRef<'r>),
    /// Of PostgreSQL.
    Postgres(PgValueRef<'r>),
}

/// A value of SQLite, with its text as `T`.
#[derive(Debug, Clone, Copy)]
pub enum SqliteCell<T> {
    /// NULL.
    Null,
    /// A number or a truth value.
    Int(i64),
    /// Text.
    Text(T),
    /// Of a type that the tables don't have.
    Other(&'static str),
}

/// An owned value of SQLite.
pub type SqliteValue = SqliteCell<String>;
/// A value of SQLite in its row.
pub type SqliteValueRef<'r> = SqliteCell<&'r str>;

impl<T> SqliteCell<T> {
    pub(super) fn map<'s, U>(&'s self, text: impl FnOnce(&'s T) -> U) -> SqliteCell<U> {
        match self {
            Self::Null => SqliteCell::Null,
            Self::Int(value) => SqliteCell::Int(*value),
            Self::Text(value) => SqliteCell::Text(text(value)),
            Self::Other(kind) => SqliteCell::Other(kind),
        }
    }

    pub(super) fn type_info(&self) -> TypeInfo {
        match self {
            Self::Null => TypeInfo::Null,
            Self::Int(_) => TypeInfo::Kind(Kind::Int),
            Self::Text(_) => TypeInfo::Kind(Kind::Text),
            Self::Other(kind) => TypeInfo::Other(kind),
        }
    }

    fn int(&self) -> Result<i64, BoxDynError> {
        match self {
            Self::Int(value) => Ok(*value),
            other => Err(format!("{} is no integer", other.type_info()).into()),
        }
    }
}

impl sqlx::Value for Value {
    type Database = Mote;

    fn as_ref(&self) -> ValueRef<'_> {
        match self {
            Self::Sqlite(value) => ValueRef::Sqlite(value.map(String::as_str)),
            Self::Postgres(value) => ValueRef::Postgres(value.as_ref()),
        }
    }

    fn type_info(&self) -> Cow<'_, TypeInfo> {
        Cow::Owned(sqlx::ValueRef::type_info(&self.as_ref()).into_owned())
    }

    fn is_null(&self) -> bool {
        sqlx::ValueRef::is_null(&self.as_ref())
    }
}

impl<'r> sqlx::ValueRef<'r> for ValueRef<'r> {
    type Database = Mote;

    fn to_owned(&self) -> Value {
        match self {
            Self::Sqlite(value) => Value::Sqlite(value.map(|text| (*text).to_owned())),
            Self::Postgres(value) => Value::Postgres(sqlx::ValueRef::to_owned(value)),
        }
    }

    fn type_info(&self) -> Cow<'_, TypeInfo> {
        Cow::Owned(match self {
            Self::Sqlite(value) => value.type_info(),
            Self::Postgres(value) => TypeInfo::Postgres(value.type_info().into_owned()),
        })
    }

    fn is_null(&self) -> bool {
        match self {
            Self::Sqlite(value) => matches!(value, SqliteCell::Null),
            Self::Postgres(value) => value.is_null(),
        }
    }
}

/// One argument of a statement.
#[derive(Debug, Clone)]
pub enum Argument {
    /// NULL of a type (PostgreSQL wants to know which).
    Null(Kind),
    /// `BOOLEAN`.
    Bool(bool),
    /// `BIGINT`.
    Int(i64),
    /// `TEXT`.
    Text(String),
}

/// The arguments of a statement.
#[derive(Debug, Default, Clone)]
pub struct Arguments(Vec<Argument>);

impl Arguments {
    /// The argument of an index from 0.
    pub(super) fn get(&self, index: usize) -> Option<&Argument> {
        self.0.get(index)
    }

    /// In PostgreSQL's form.
    ///
    /// # Errors
    /// If one is too large for the database.
    pub(super) fn into_postgres(self) -> Result<PgArguments, BoxDynError> {
        let mut native = PgArguments::default();
        for argument in self.0 {
            match argument {
                Argument::Null(Kind::Bool) => native.add(None::<bool>)?,
                Argument::Null(Kind::Int) => native.add(None::<i64>)?,
                Argument::Null(Kind::Text) => native.add(None::<String>)?,
                Argument::Bool(value) => native.add(value)?,
                Argument::Int(value) => native.add(value)?,
                Argument::Text(value) => native.add(value)?,
            }
        }
        Ok(native)
    }
}

impl sqlx::Arguments for Arguments {
    type Database = Mote;

    fn reserve(&mut self, additional: usize, _size: usize) {
        self.0.reserve(additional);
    }

    fn add<'t, T: Encode<'t, Mote> + Type<Mote>>(&mut self, value: T) -> Result<(), BoxDynError> {
        if value.encode(&mut self.0)?.is_null() {
            let TypeInfo::Kind(kind) = T::type_info() else {
                return Err("an argument's type is one of Rust's".into());
            };
            self.0.push(Argument::Null(kind));
        }
        Ok(())
    }

    fn len(&self) -> usize {
        self.0.len()
    }

    fn format_placeholder<W: fmt::Write>(&self, writer: &mut W) -> fmt::Result {
        // Both databases know this form.
        write!(writer, "${}", self.0.len())
    }
}

sqlx_core::impl_into_arguments_for_arguments!(Arguments);
sqlx_core::impl_encode_for_option!(Mote);

impl Type<Mote> for bool {
    fn type_info() -> TypeInfo {
        TypeInfo::Kind(Kind::Bool)
    }

    fn compatible(found: &TypeInfo) -> bool {
        match found {
            TypeInfo::Kind(kind) => matches!(kind, Kind::Bool | Kind::Int),
            TypeInfo::Postgres(info) => <bool as Type<Postgres>>::compatible(info),
            TypeInfo::Null | TypeInfo::Other(_) => false,
        }
    }
}

impl Encode<'_, Mote> for bool {
    fn encode_by_ref(&self, buffer: &mut Vec<Argument>) -> Result<IsNull, BoxDynError> {
        buffer.push(Argument::Bool(*self));
        Ok(IsNull::No)
    }
}

impl<'r> Decode<'r, Mote> for bool {
    fn decode(value: ValueRef<'r>) -> Result<Self, BoxDynError> {
        match value {
            ValueRef::Sqlite(value) => Ok(value.int()? != 0),
            ValueRef::Postgres(value) => Decode::<Postgres>::decode(value),
        }
    }
}

impl Type<Mote> for i64 {
    fn type_info() -> TypeInfo {
        TypeInfo::Kind(Kind::Int)
    }

    fn compatible(found: &TypeInfo) -> bool {
        match found {
            TypeInfo::Kind(kind) => *kind == Kind::Int,
            TypeInfo::Postgres(info) => matches!(info.name(), "INT2" | "INT4" | "INT8" | "NUMERIC"),
            TypeInfo::Null | TypeInfo::Other(_) => false,
        }
    }
}

impl Encode<'_, Mote> for i64 {
    fn encode_by_ref(&self, buffer: &mut Vec<Argument>) -> Result<IsNull, BoxDynError> {
        buffer.push(Argument::Int(*self));
        Ok(IsNull::No)
    }
}

impl<'r> Decode<'r, Mote> for i64 {
    fn decode(value: ValueRef<'r>) -> Result<Self, BoxDynError> {
        let value = match value {
            ValueRef::Sqlite(value) => return value.int(),
            ValueRef::Postgres(value) => value,
        };
        if value.format() == PgValueFormat::Text {
            return Ok(value.as_str()?.parse()?);
        }
        let numeric = value.type_info().name() == "NUMERIC";
        let bytes = value.as_bytes()?;
        match (numeric, bytes.len()) {
            (true, _) => whole_numeric(bytes).ok_or_else(|| "a sum is not a whole number of 64 bits".into()),
            (false, 8) => Ok(i64::from_be_bytes(bytes.try_into()?)),
            (false, 4) => Ok(i32::from_be_bytes(bytes.try_into()?).into()),
            (false, 2) => Ok(i16::from_be_bytes(bytes.try_into()?).into()),
            (false, length) => Err(format!("an integer of {length} bytes").into()),
        }
    }
}

/// PostgreSQL's `numeric` in its binary form, if it is whole and fits: counts of digits, weight of the first one, sign
/// and scale (16 bits each), then the digits to the base 10,000 (`numeric_send` in PostgreSQL's `numeric.c`).
fn whole_numeric(bytes: &[u8]) -> Option<i64> {
    const NEGATIVE: i16 = 0x4000;
    let words: Vec<i16> = bytes.chunks_exact(2).map(|pair| i16::from_be_bytes([pair[0], pair[1]])).collect();
    let (head, digits) = words.split_at_checked(4)?;
    let (count, weight, sign) = (head[0], head[1], head[2]);
    if usize::try_from(count).ok()? != digits.len() || (sign != 0 && sign != NEGATIVE) {
        return None;
    }
    let mut value: i64 = 0;
    // Digits beyond those that are sent are zeros.
    for place in 0..=weight.clamp(-1, 8) {
        let digit = digits.get(usize::try_from(place).ok()?).copied().unwrap_or(0);
        value = value.checked_mul(10_000)?.checked_add(digit.into())?;
    }
    let whole_places = usize::try_from(weight + 1).unwrap_or(0);
    let whole = weight <= 8 && digits.iter().skip(whole_places).all(|digit| *digit == 0);
    whole.then(|| if sign == NEGATIVE { -value } else { value })
}

impl Type<Mote> for i32 {
    fn type_info() -> TypeInfo {
        <i64 as Type<Mote>>::type_info()
    }

    fn compatible(found: &TypeInfo) -> bool {
        <i64 as Type<Mote>>::compatible(found)
    }
}

impl Encode<'_, Mote> for i32 {
    fn encode_by_ref(&self, buffer: &mut Vec<Argument>) -> Result<IsNull, BoxDynError> {
        buffer.push(Argument::Int((*self).into()));
        Ok(IsNull::No)
    }
}

impl<'r> Decode<'r, Mote> for i32 {
    fn decode(value: ValueRef<'r>) -> Result<Self, BoxDynError> {
        Ok(<i64 as Decode<Mote>>::decode(value)?.try_into()?)
    }
}

impl Type<Mote> for str {
    fn type_info() -> TypeInfo {
        TypeInfo::Kind(Kind::Text)
    }

    fn compatible(found: &TypeInfo) -> bool {
        match found {
            TypeInfo::Kind(kind) => *kind == Kind::Text,
            TypeInfo::Postgres(info) => <str as Type<Postgres>>::compatible(info),
            TypeInfo::Null | TypeInfo::Other(_) => false,
        }
    }
}

impl Encode<'_, Mote> for &'_ str {
    fn encode_by_ref(&self, buffer: &mut Vec<Argument>) -> Result<IsNull, BoxDynError> {
        buffer.push(Argument::Text((*self).to_owned()));
        Ok(IsNull::No)
    }
}

impl<'r> Decode<'r, Mote> for &'r str {
    fn decode(value: ValueRef<'r>) -> Result<Self, BoxDynError> {
        match value {
            ValueRef::Sqlite(SqliteCell::Text(text)) => Ok(text),
            ValueRef::Sqlite(other) => Err(format!("{} is no text", other.type_info()).into()),
            ValueRef::Postgres(value) => Decode::<Postgres>::decode(value),
        }
    }
}

impl Type<Mote> for String {
    fn type_info() -> TypeInfo {
        <str as Type<Mote>>::type_info()
    }

    fn compatible(found: &TypeInfo) -> bool {
        <str as Type<Mote>>::compatible(found)
    }
}

impl Encode<'_, Mote> for String {
    fn encode(self, buffer: &mut Vec<Argument>) -> Result<IsNull, BoxDynError> {
        buffer.push(Argument::Text(self));
        Ok(IsNull::No)
    }

    fn encode_by_ref(&self, buffer: &mut Vec<Argument>) -> Result<IsNull, BoxDynError> {
        buffer.push(Argument::Text(self.clone()));
        Ok(IsNull::No)
    }
}

impl<'r> Decode<'r, Mote> for String {
    fn decode(value: ValueRef<'r>) -> Result<Self, BoxDynError> {
        <&str as Decode<Mote>>::decode(value).map(str::to_owned)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_of_postgresql_are_read_exactly() {
        let numeric = |words: &[i16]| {
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
            whole_numeric(&bytes)
        };
        assert_eq!(numeric(&[0, 0, 0, 0]), Some(0));
        assert_eq!(numeric(&[2, 1, 0, 0, 12, 3456]), Some(123_456));
        assert_eq!(numeric(&[1, 1, 0, 0, 3]), Some(30_000), "zeros at the end are not sent");
        assert_eq!(numeric(&[5, 4, 0, 0, 922, 3372, 368, 5477, 5807]), Some(i64::MAX));
        assert_eq!(numeric(&[1, 0, 0x4000, 0, 7]), Some(-7));
        assert_eq!(numeric(&[5, 4, 0, 0, 922, 3372, 368, 5477, 5808]), None, "too large");
        assert_eq!(numeric(&[2, 0, 0, 2, 1, 5000]), None, "1.5 is not whole");
        assert_eq!(numeric(&[1, -1, 0, 2, 5000]), None, "0.5 is not whole");
        assert_eq!(numeric(&[1, 0, -16384, 0, 1]), None, "not a number");
        assert_eq!(numeric(&[2, 0]), None);
    }
}
