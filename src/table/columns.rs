//! Rows as plain structs, straight into Arrow columns.
//!
//! The way in for the rows of the log, of which there are many. A row's fields are the table's columns, by name and in
//! order: so each value goes to the builder that is next, with no map, no copy of a name and no second pass. Rows of
//! other shapes go through `rows`.

use std::sync::Arc;

use arrow::array::{
    ArrayRef, BinaryBuilder, BooleanBuilder, Date32Builder, Float64Builder, Int32Builder, Int64Builder, RecordBatch,
    StringBuilder, TimestampMicrosecondBuilder,
};
use chrono::NaiveDate;
use serde::de::value::Error;
use serde::ser::{Error as _, Impossible, Serialize, SerializeStruct, Serializer};

use super::TableError;
use super::schema::{Kind, TableSpec};

/// Columns that are being filled, row by row.
pub struct Columns {
    spec: &'static TableSpec,
    builders: Vec<Builder>,
    rows: usize,
}

/// Returns the batch of rows whose fields are exactly the table's columns, JSON columns already as text.
pub fn batch_of<T: Serialize>(spec: &'static TableSpec, rows: &[T]) -> Result<RecordBatch, TableError> {
    let mut columns = Columns::new(spec);
    rows.iter().try_for_each(|row| columns.push(row))?;
    columns.finish()
}

impl Columns {
    /// Returns the columns of a table without a row.
    pub fn new(spec: &'static TableSpec) -> Self {
        Columns { spec, builders: spec.columns.iter().map(|column| Builder::new(column.kind)).collect(), rows: 0 }
    }

    /// Adds a row: a struct whose fields are the columns in their order. Binary columns take bytes or hex, dates
    /// `YYYY-MM-DD`. After an error the columns are of no more use.
    pub fn push<T: Serialize>(&mut self, row: &T) -> Result<(), TableError> {
        let next = row.serialize(RowWriter { columns: self, next: 0 }).map_err(|e| self.misfit(e.to_string()))?;
        self.rows += 1;
        match self.spec.columns.get(next) {
            Some(column) => Err(self.misfit(format!("a row has no {}", column.name))),
            None => Ok(()),
        }
    }

    /// Returns all rows as a batch.
    pub fn finish(self) -> Result<RecordBatch, TableError> {
        let arrays = self.builders.into_iter().map(Builder::finish).collect();
        let batch = RecordBatch::try_new(self.spec.arrow_schema(), arrays);
        batch.map_err(|e| TableError::Rows { table: self.spec.name.to_owned(), why: e.to_string() })
    }

    fn misfit(&self, why: String) -> TableError {
        TableError::Rows { table: self.spec.name.to_owned(), why }
    }
}

/// The builder of one column. Every row adds one value or a null.
enum Builder {
    Bool(BooleanBuilder),
    Int(Int32Builder),
    Long(Int64Builder),
    Double(Float64Builder),
    Time(TimestampMicrosecondBuilder),
    /// Beside it the last date as text: a batch has mostly one.
    Date(Date32Builder, Option<(String, i32)>),
    Text(StringBuilder),
    Bytes(BinaryBuilder),
    /// A column that rows of the log do not have.
    None,
}

impl Builder {
    fn new(kind: Kind) -> Self {
        match kind {
            Kind::Bool => Builder::Bool(BooleanBuilder::new()),
            Kind::Int => Builder::Int(Int32Builder::new()),
            Kind::Long => Builder::Long(Int64Builder::new()),
            Kind::Double => Builder::Double(Float64Builder::new()),
            Kind::Time => Builder::Time(TimestampMicrosecondBuilder::new().with_timezone("UTC")),
            Kind::Date => Builder::Date(Date32Builder::new(), None),
            Kind::Word | Kind::Id | Kind::Text | Kind::Json | Kind::Rest => Builder::Text(StringBuilder::new()),
            Kind::Bytes => Builder::Bytes(BinaryBuilder::new()),
            Kind::Ints | Kind::Floats => Builder::None,
        }
    }

    fn finish(self) -> ArrayRef {
        match self {
            Builder::Bool(mut builder) => Arc::new(builder.finish()),
            Builder::Int(mut builder) => Arc::new(builder.finish()),
            Builder::Long(mut builder) => Arc::new(builder.finish()),
            Builder::Double(mut builder) => Arc::new(builder.finish()),
            Builder::Time(mut builder) => Arc::new(builder.finish()),
            Builder::Date(mut builder, _) => Arc::new(builder.finish()),
            Builder::Text(mut builder) => Arc::new(builder.finish()),
            Builder::Bytes(mut builder) => Arc::new(builder.finish()),
            Builder::None => Arc::new(arrow::array::NullArray::new(0)),
        }
    }

    fn null(&mut self) {
        match self {
            Builder::Bool(builder) => builder.append_null(),
            Builder::Int(builder) => builder.append_null(),
            Builder::Long(builder) => builder.append_null(),
            Builder::Double(builder) => builder.append_null(),
            Builder::Time(builder) => builder.append_null(),
            Builder::Date(builder, _) => builder.append_null(),
            Builder::Text(builder) => builder.append_null(),
            Builder::Bytes(builder) => builder.append_null(),
            Builder::None => {}
        }
    }

    fn bool(&mut self, value: bool) -> Result<(), Error> {
        let Builder::Bool(builder) = self else { return Err(Error::custom("is a truth value")) };
        builder.append_value(value);
        Ok(())
    }

    fn integer(&mut self, value: i64) -> Result<(), Error> {
        match self {
            Builder::Int(builder) => builder.append_value(i32::try_from(value).map_err(Error::custom)?),
            Builder::Long(builder) => builder.append_value(value),
            Builder::Time(builder) => builder.append_value(value),
            Builder::Double(builder) => builder.append_value(value as f64),
            _ => return Err(Error::custom("is an integer")),
        }
        Ok(())
    }

    fn double(&mut self, value: f64) -> Result<(), Error> {
        let Builder::Double(builder) = self else { return Err(Error::custom("is a fraction")) };
        builder.append_value(value);
        Ok(())
    }

    fn text(&mut self, value: &str) -> Result<(), Error> {
        match self {
            Builder::Text(builder) => builder.append_value(value),
            Builder::Bytes(builder) => builder.append_value(hex::decode(value).map_err(Error::custom)?),
            Builder::Date(builder, Some((last, days))) if last == value => builder.append_value(*days),
            Builder::Date(builder, last) => {
                let date = value.parse::<NaiveDate>().map_err(Error::custom)?;
                let days = (date - NaiveDate::default()).num_days() as i32;
                builder.append_value(days);
                *last = Some((value.to_owned(), days));
            }
            _ => return Err(Error::custom("is a text")),
        }
        Ok(())
    }

    fn bytes(&mut self, value: &[u8]) -> Result<(), Error> {
        let Builder::Bytes(builder) = self else { return Err(Error::custom("is bytes")) };
        builder.append_value(value);
        Ok(())
    }
}

/// Takes one row: its fields in order. Ends with the number of columns it has filled.
struct RowWriter<'a> {
    columns: &'a mut Columns,
    next: usize,
}

impl SerializeStruct for RowWriter<'_> {
    type Ok = usize;
    type Error = Error;

    fn serialize_field<T: Serialize + ?Sized>(&mut self, name: &'static str, value: &T) -> Result<(), Error> {
        let expected = self.columns.spec.columns.get(self.next).map_or("no more", |column| column.name);
        if name != expected {
            return Err(Error::custom(format!("a row has {name} where the table has {expected}")));
        }
        let builder = &mut self.columns.builders[self.next];
        value.serialize(Cell(builder)).map_err(|e| Error::custom(format!("{name}: {e}")))?;
        self.next += 1;
        Ok(())
    }

    fn end(self) -> Result<usize, Error> {
        Ok(self.next)
    }
}

/// Takes one value for the column it holds.
struct Cell<'a>(&'a mut Builder);

/// Writes the methods of a [`Serializer`] that refuse what `$what` cannot be.
macro_rules! refuse {
    ($what:literal, $ok:ty: $($method:ident($($type:ty),*)),* $(,)?) => {
        $(fn $method(self, $(_: $type),*) -> Result<$ok, Error> { Err(Error::custom($what)) })*
    };
}

macro_rules! refuse_compounds {
    ($what:literal, $ok:ty) => {
        type SerializeSeq = Impossible<$ok, Error>;
        type SerializeTuple = Impossible<$ok, Error>;
        type SerializeTupleStruct = Impossible<$ok, Error>;
        type SerializeTupleVariant = Impossible<$ok, Error>;
        type SerializeMap = Impossible<$ok, Error>;
        type SerializeStructVariant = Impossible<$ok, Error>;
        refuse!($what, Impossible<$ok, Error>: serialize_seq(Option<usize>), serialize_tuple(usize),
            serialize_tuple_struct(&'static str, usize),
            serialize_tuple_variant(&'static str, u32, &'static str, usize), serialize_map(Option<usize>),
            serialize_struct_variant(&'static str, u32, &'static str, usize));
        fn serialize_newtype_variant<T: Serialize + ?Sized>(
            self,
            _: &'static str,
            _: u32,
            _: &'static str,
            _: &T,
        ) -> Result<$ok, Error> {
            Err(Error::custom($what))
        }
    };
}

impl<'a> Serializer for RowWriter<'a> {
    type Ok = usize;
    type Error = Error;
    type SerializeStruct = RowWriter<'a>;

    fn serialize_struct(self, _: &'static str, _: usize) -> Result<Self, Error> {
        Ok(self)
    }

    refuse_compounds!("a row is no struct", usize);
    refuse!("a row is no struct", usize: serialize_bool(bool), serialize_i8(i8), serialize_i16(i16), serialize_i32(i32),
        serialize_i64(i64), serialize_u8(u8), serialize_u16(u16), serialize_u32(u32), serialize_u64(u64),
        serialize_f32(f32), serialize_f64(f64), serialize_char(char), serialize_str(&str), serialize_bytes(&[u8]),
        serialize_none(), serialize_unit(), serialize_unit_struct(&'static str),
        serialize_unit_variant(&'static str, u32, &'static str));

    fn serialize_some<T: Serialize + ?Sized>(self, row: &T) -> Result<usize, Error> {
        row.serialize(self)
    }

    fn serialize_newtype_struct<T: Serialize + ?Sized>(self, _: &'static str, row: &T) -> Result<usize, Error> {
        row.serialize(self)
    }
}

/// Writes the methods that take integers.
macro_rules! integers {
    ($($method:ident($type:ty)),*) => {
        $(fn $method(self, value: $type) -> Result<(), Error> {
            self.0.integer(i64::try_from(value).map_err(Error::custom)?)
        })*
    };
}

impl Serializer for Cell<'_> {
    type Ok = ();
    type Error = Error;
    type SerializeStruct = Impossible<(), Error>;

    integers!(
        serialize_i8(i8),
        serialize_i16(i16),
        serialize_i32(i32),
        serialize_i64(i64),
        serialize_u8(u8),
        serialize_u16(u16),
        serialize_u32(u32),
        serialize_u64(u64)
    );
    refuse_compounds!("is a list or an object", ());
    refuse!("is a struct", Impossible<(), Error>: serialize_struct(&'static str, usize));

    fn serialize_bool(self, value: bool) -> Result<(), Error> {
        self.0.bool(value)
    }

    fn serialize_f32(self, value: f32) -> Result<(), Error> {
        self.0.double(f64::from(value))
    }

    fn serialize_f64(self, value: f64) -> Result<(), Error> {
        self.0.double(value)
    }

    fn serialize_char(self, value: char) -> Result<(), Error> {
        self.0.text(value.encode_utf8(&mut [0; 4]))
    }

    fn serialize_str(self, value: &str) -> Result<(), Error> {
        self.0.text(value)
    }

    fn serialize_bytes(self, value: &[u8]) -> Result<(), Error> {
        self.0.bytes(value)
    }

    fn serialize_none(self) -> Result<(), Error> {
        self.0.null();
        Ok(())
    }

    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Result<(), Error> {
        value.serialize(self)
    }

    fn serialize_unit(self) -> Result<(), Error> {
        self.serialize_none()
    }

    fn serialize_unit_struct(self, _: &'static str) -> Result<(), Error> {
        self.serialize_none()
    }

    fn serialize_unit_variant(self, _: &'static str, _: u32, name: &'static str) -> Result<(), Error> {
        self.0.text(name)
    }

    fn serialize_newtype_struct<T: Serialize + ?Sized>(self, _: &'static str, value: &T) -> Result<(), Error> {
        value.serialize(self)
    }
}

#[cfg(test)]
mod tests {
    use serde::Serialize;

    use super::*;
    use crate::table::schema::DEAD_LETTERS;
    use crate::table::write::batch_of_any;

    #[derive(Serialize)]
    struct Letter {
        topic: &'static str,
        partition: i32,
        offset: i64,
        record_index: i32,
        key: Option<&'static str>,
        headers: Option<String>,
        kafka_time: Option<i64>,
        ingest_date: &'static str,
        payload: &'static str,
        reason: &'static str,
        message: String,
        taod_version: &'static str,
        config_hash: &'static str,
    }

    fn letter(offset: i64, ingest_date: &'static str) -> Letter {
        Letter {
            topic: "t",
            partition: 3,
            offset,
            record_index: 0,
            key: (offset % 2 == 0).then_some("00ff"),
            headers: (offset % 3 == 0).then(|| "[]".to_owned()),
            kafka_time: (offset % 5 == 0).then_some(offset * 1_000_000),
            ingest_date,
            payload: "7b",
            reason: "not_json",
            message: "ä€".repeat(offset as usize),
            taod_version: "0",
            config_hash: "c",
        }
    }

    #[test]
    fn it_makes_the_batch_that_the_general_way_makes() {
        let rows: Vec<Letter> =
            (0..20).map(|n| letter(n, ["1969-12-31", "2026-02-28", "2026-03-01"][n as usize % 3])).collect();
        assert_eq!(batch_of(&DEAD_LETTERS, &rows).unwrap(), batch_of_any(&DEAD_LETTERS, &rows).unwrap());
    }

    #[test]
    fn a_row_of_another_shape_is_refused_with_the_field() {
        #[derive(Serialize)]
        struct Short {
            topic: &'static str,
        }
        #[derive(Serialize)]
        struct Swapped {
            partition: i32,
        }
        let refusal = |batch: Result<RecordBatch, TableError>| batch.unwrap_err().to_string();
        assert!(refusal(batch_of(&DEAD_LETTERS, &[Short { topic: "t" }])).contains("partition"));
        assert!(refusal(batch_of(&DEAD_LETTERS, &[Swapped { partition: 1 }])).contains("topic"));
        assert!(refusal(batch_of(&DEAD_LETTERS, &[1])).contains("struct"));
        assert!(refusal(batch_of(&DEAD_LETTERS, &[letter(1, "yesterday")])).contains("ingest_date"));
    }
}
