//! Rows, columns and prepared statements: the native ones, handed through.

use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicUsize, Ordering},
};

use sqlx::{
    Column as _, ColumnIndex, Decode, Either, SqlStr, Statement as _, Type, TypeInfo as _, ValueRef as _,
    postgres::{PgRow, PgStatement},
};

use super::{Arguments, Mote, TypeInfo, ValueRef, sqlite::Rows};

/// A row. Values are decoded from the native row, without a copy in between.
pub struct Row {
    native: NativeRow,
    /// Made when somebody asks, which nobody does who decodes by name or number.
    columns: OnceLock<Box<[Column]>>,
}

enum NativeRow {
    Sqlite {
        /// All rows of the statement.
        rows: Arc<Rows>,
        /// Which of them this is.
        place: usize,
        /// The column after the one that was last asked for by name: who decodes a row asks for its columns in order.
        next: AtomicUsize,
    },
    Postgres(PgRow),
}

impl Row {
    /// A row of SQLite.
    pub(super) fn of_sqlite(rows: Arc<Rows>, place: usize) -> Self {
        Self {
            native: NativeRow::Sqlite { rows, place, next: AtomicUsize::new(0) },
            columns: OnceLock::new(),
        }
    }
}

impl From<PgRow> for Row {
    fn from(row: PgRow) -> Self {
        Self { native: NativeRow::Postgres(row), columns: OnceLock::new() }
    }
}

/// A column of a row or a statement.
#[derive(Debug, Clone)]
pub struct Column {
    ordinal: usize,
    name: Box<str>,
    type_info: TypeInfo,
}

impl sqlx::Column for Column {
    type Database = Mote;

    fn ordinal(&self) -> usize {
        self.ordinal
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn type_info(&self) -> &TypeInfo {
        &self.type_info
    }
}

/// Columns of SQLite, whose types are those of the values.
fn sqlite_columns<'a>(named: impl Iterator<Item = (&'a str, TypeInfo)>) -> Box<[Column]> {
    let numbered = named.enumerate();
    numbered.map(|(ordinal, (name, type_info))| Column { ordinal, name: name.into(), type_info }).collect()
}

fn postgres_columns(columns: &[sqlx::postgres::PgColumn]) -> Box<[Column]> {
    let column = |c: &sqlx::postgres::PgColumn| Column {
        ordinal: c.ordinal(),
        name: c.name().into(),
        type_info: TypeInfo::Postgres(c.type_info().clone()),
    };
    columns.iter().map(column).collect()
}

impl sqlx::Row for Row {
    type Database = Mote;

    fn len(&self) -> usize {
        match &self.native {
            NativeRow::Sqlite { rows, .. } => rows.names().len(),
            NativeRow::Postgres(row) => row.len(),
        }
    }

    fn columns(&self) -> &[Column] {
        self.columns.get_or_init(|| match &self.native {
            NativeRow::Sqlite { rows, place, .. } => {
                let of =
                    |column| rows.value(*place, column).map_or(TypeInfo::Null, |value| value.type_info());
                let named = rows.names().iter().enumerate();
                sqlite_columns(named.map(|(column, name)| (&**name, of(column))))
            }
            NativeRow::Postgres(row) => postgres_columns(row.columns()),
        })
    }

    fn try_get<'r, T, I>(&'r self, index: I) -> Result<T, sqlx::Error>
    where
        I: ColumnIndex<Self>,
        T: Decode<'r, Mote> + Type<Mote>,
    {
        let value = self.try_get_raw(&index)?;
        let failed = |source| sqlx::Error::ColumnDecode { index: format!("{index:?}"), source };
        if !value.is_null() {
            let found = value.type_info();
            if !found.is_null() && !T::compatible(&found) {
                let text = format!("{found} can't be read as {}", std::any::type_name::<T>());
                return Err(failed(text.into()));
            }
        }
        T::decode(value).map_err(failed)
    }

    fn try_get_raw<I: ColumnIndex<Self>>(&self, index: I) -> Result<ValueRef<'_>, sqlx::Error> {
        let index = index.index(self)?;
        Ok(match &self.native {
            NativeRow::Sqlite { rows, place, .. } => ValueRef::Sqlite(rows.value(*place, index)?),
            NativeRow::Postgres(row) => ValueRef::Postgres(row.try_get_raw(index)?),
        })
    }
}

sqlx_core::impl_column_index_for_row!(Row);

impl ColumnIndex<Row> for &'_ str {
    fn index(&self, row: &Row) -> Result<usize, sqlx::Error> {
        match &row.native {
            NativeRow::Sqlite { rows, next, .. } => {
                let names = rows.names();
                let expected = next.load(Ordering::Relaxed);
                let found = match names.get(expected).is_some_and(|name| **name == **self) {
                    true => Some(expected),
                    false => names.iter().position(|name| **name == **self),
                };
                let found = found.ok_or_else(|| sqlx::Error::ColumnNotFound((*self).to_owned()))?;
                next.store(found + 1, Ordering::Relaxed);
                Ok(found)
            }
            NativeRow::Postgres(row) => ColumnIndex::<PgRow>::index(self, row),
        }
    }
}

/// A prepared statement.
#[derive(Debug, Clone)]
pub struct Statement {
    sql: SqlStr,
    columns: Box<[Column]>,
}

impl Statement {
    pub(super) fn of_sqlite(sql: SqlStr, names: &[Box<str>]) -> Self {
        Self { columns: sqlite_columns(names.iter().map(|name| (&**name, TypeInfo::Null))), sql }
    }

    pub(super) fn from_postgres(statement: PgStatement) -> Self {
        Self { columns: postgres_columns(statement.columns()), sql: statement.into_sql() }
    }
}

impl sqlx::Statement for Statement {
    type Database = Mote;

    fn into_sql(self) -> SqlStr {
        self.sql
    }

    fn sql(&self) -> &SqlStr {
        &self.sql
    }

    fn parameters(&self) -> Option<Either<&[TypeInfo], usize>> {
        None
    }

    fn columns(&self) -> &[Column] {
        &self.columns
    }

    sqlx_core::impl_statement_query!(Arguments);
}

sqlx_core::impl_column_index_for_statement!(Statement);

impl ColumnIndex<Statement> for &'_ str {
    fn index(&self, statement: &Statement) -> Result<usize, sqlx::Error> {
        let found = statement.columns.iter().position(|column| &*column.name == *self);
        found.ok_or_else(|| sqlx::Error::ColumnNotFound((*self).to_owned()))
    }
}
